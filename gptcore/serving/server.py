"""The server: a model, its routes and its limits as one application, and the process that runs it."""

from __future__ import annotations

import socket
from collections.abc import Collection, Sequence
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from gptcore.serving import chat, completions, errors, routes
from gptcore.serving.connection import Server
from gptcore.serving.guard import Guard
from gptcore.serving.limits import Limits
from gptcore.serving.served import Served


def make_app(
    served: Served, more: Sequence[APIRouter] = (), *, keys: Sequence[bytes] = (), hosts: Collection[str] | None = None
) -> Guard:
    """Return the application.

    more: routes beside those of every model, and of completions where it has an engine.
    keys: API keys; without any no request needs one.
    hosts: names that the Host header may have; None for any.
    """
    app = FastAPI(title="gptcore", version="1", docs_url=None, redoc_url=None, redirect_slashes=False)
    for kind, handler in (
        (errors.Problem, errors.on_problem),
        (HTTPException, errors.on_http_error),
        (RequestValidationError, errors.on_invalid),
        (Exception, errors.on_failure),
    ):
        app.add_exception_handler(kind, handler)
    routers = [*more]
    if served.generates:
        routers.append(completions.routes(served))
        if served.template is not None:
            routers.append(chat.routes(served, served.template))
    for router in routers:
        app.include_router(router)
    served.routes = [route.path for router in routers for route in router.routes if hasattr(route, "path")]
    app.include_router(routes.routes(served))
    app.include_router(routes.page_routes())
    described = app.openapi

    def openapi() -> dict[str, Any]:
        """Return the OpenAPI document without FastAPI's own answer to an invalid request, which is 400 here."""
        if app.openapi_schema is None:
            for path in described()["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]

    def count(route: str, status: str) -> None:
        served.metrics.requests.labels(route, status).inc()

    return Guard(app, served.limits, keys, hosts, count)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens. Raises OSError with the address where it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=256)
    except (OSError, OverflowError) as error:
        raise OSError(f"cannot listen at {host} port {port}: {error}") from None


def make_server(guard: Guard, limits: Limits, origins: Sequence[str] = ()) -> Server:
    """Return a server of the application. origins: of pages on other sites that may use it ("*" for all)."""
    app: Any = guard
    if origins:
        app = CORSMiddleware(
            guard, allow_origins=origins, allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"], expose_headers=["x-request-id"],
        )  # fmt: skip
    return Server(app, guard, limits, log_level="error", access_log=False)
