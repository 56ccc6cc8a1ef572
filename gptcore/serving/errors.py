"""Errors as OpenAI's clients read them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


class Problem(Exception):
    """An error that is reported to the client. param: the field of the request that is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)

    def event(self) -> bytes:
        """Return the error as an event of a stream, the one way to fail after the status has been sent."""
        return f"data: {json.dumps(self.body)}\n\n".encode()


BUSY = {"Retry-After": "1"}


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the errors of a route for the OpenAPI document; those that every route has are included."""
    always = (400, 401, 403, 408, 413, 429, 500, 503, 504)
    return {status: {"model": ErrorBody} for status in sorted({*always, *statuses})}


class Route(APIRoute):
    """A route whose JSON names each field once: of two values one would be accepted and ignored."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handle(_Request(request.scope, request.receive))

        return strict


class _Request(Request):
    async def json(self) -> Any:
        try:
            return json.loads(await self.body(), object_pairs_hook=_unique)
        except json.JSONDecodeError:
            raise
        except (ValueError, RecursionError) as error:  # bytes that are no text, thousands of digits or of brackets
            raise HTTPException(400, f"the body cannot be read as JSON: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{ascii(twice)[:40]} is there twice")
    return found


async def on_problem(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Problem)
    return error.response()


async def on_http_error(request: Request, error: Exception) -> JSONResponse:
    """Answer an unknown path, a wrong method and a body that is not JSON."""
    assert isinstance(error, HTTPException)
    path = ascii(request.url.path)[:100]
    known = {404: f"there is no route {path}; /openapi.json lists them",
             405: f"{request.method} is not allowed for {path}"}  # fmt: skip
    message = known.get(error.status_code, str(error.detail))
    return Problem(error.status_code, message, headers=error.headers).response()


async def on_invalid(request: Request, error: Exception) -> JSONResponse:
    """Answer 400 with the field that is wrong, what was given and what was expected."""
    assert isinstance(error, RequestValidationError)
    if isinstance(error.body, bytes):
        return Problem(
            400, "the body was not sent as JSON; send the header 'Content-Type: application/json'"
        ).response()
    # A union states an error for each of its types. The type that was meant fits, or does so furthest
    param, first = max(
        ((_field(entry, error.body), entry) for entry in error.errors()),
        key=lambda pair: (not pair[1]["type"].endswith("_type"), len(pair[0])),
    )
    name = ".".join(param) or "the body"
    given = ascii(first.get("input"))
    given = given if len(given) <= 60 else given[:57] + "..."
    message = {
        "json_invalid": f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}",
        "extra_forbidden": f"{name} is not a field of this route; /openapi.json lists those that are",
        "missing": f"{name} is missing; it is required",
        "value_error": first["msg"].removeprefix("Value error, "),
    }.get(first["type"], f"{name}: {first['msg'][:1].lower()}{first['msg'][1:]}, not {given}")
    return Problem(400, message, param=".".join(param) or None).response()


def _field(entry: dict[str, Any], body: Any) -> list[str]:
    """Return the path to a field that is wrong; in the location there are names of types, too."""
    path = []
    for part in entry["loc"][1:]:
        if (isinstance(body, dict) and part in body) or (isinstance(body, list) and isinstance(part, int)):
            body = body[part]
            path.append(ascii(part)[:40].strip("'"))
    missing = [str(entry["loc"][-1])] if entry["type"] == "missing" and len(entry["loc"]) > 1 else []
    return path + missing


async def on_failure(request: Request, error: Exception) -> JSONResponse:
    return Problem(500, "the server failed at this request; its log says why").response()
