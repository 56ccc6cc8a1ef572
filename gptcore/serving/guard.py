"""What happens around every request: host, key, size, time, and a client that goes away."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import logging
import re
import uuid
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptcore.files import open_file
from gptcore.serving.errors import BUSY, Problem
from gptcore.serving.limits import Limits

OPEN = {"/health"}  # needs no key
DISCARDED = 16  # times max_body_bytes: read and thrown away, so that the client can read why
LOOPBACK = {"localhost", "127.0.0.1", "[::1]"}
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}
logger = logging.getLogger("gptcore.serving")


def read_keys(path: str) -> list[bytes]:
    """Return the keys in a file, one a line; blank lines and lines from # on are left out.

    Raises OSError, or ValueError for a file without keys and for a key that no header can hold.
    """
    with open_file(Path(path)) as file:
        lines = [line.strip() for line in file.read().splitlines()]
    keys = [line for line in lines if line and not line.startswith(b"#")]
    if not keys:
        raise ValueError(f"{path} has no key; write one a line")
    if any(len(key) < 16 or not key.isascii() or b" " in key for key in keys):
        raise ValueError(f"{path} has a key that is shorter than 16 characters, not ASCII, or has a space in it")
    return keys


class Guard:
    """The outermost ASGI application.

    Reads the whole body before the inner application runs, within its limits. Watches the connection while that runs:
    it is cancelled as soon as the client is gone, or after limits.request_seconds. `running` counts requests; while
    `draining`, new ones get 503, as all do while there are too many `connections`.

    count: called with the route and the status of each request at its end; the status is "dropped" without a response.
    hosts: names that the Host header may have; None for any. It stops pages of other sites that have their own name
        resolve to this machine (DNS rebinding).
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        keys: Sequence[bytes] = (),
        hosts: Collection[str] | None = None,
        count: Callable[[str, str], None] = lambda route, status: None,
    ) -> None:
        self.app, self.limits, self.count = app, limits, count
        self.keys = [hashlib.sha256(key).digest() for key in keys]
        self.hosts = hosts
        self.running, self.draining = 0, False
        self.connections: Collection[object] = ()
        self._work: set[asyncio.Future[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        if scope["method"] == "HEAD":  # uvicorn leaves the body out
            scope = {**scope, "method": "GET"}
        answer = _Answer(send)
        at_end: list[Callable[[], None]] = []  # what a route has begun, and ends when its request does
        self.running += 1
        try:
            owner = self._admit(scope)
            body = await self._read(Headers(scope=scope), receive)
            scope["state"] = {"owner": owner, "at_end": at_end}
            await self._run(scope, body, receive, answer)
        except Problem as problem:
            await answer.fail(problem, scope)
        except ConnectionError:  # went away while it sent the body
            pass
        finally:
            for end in at_end:
                end()
            self.running -= 1
            self.count(getattr(scope.get("route"), "path", "other"), answer.status)

    def _admit(self, scope: Scope) -> str:
        """Return the owner of the request's key. Raises Problem for a request that may not be made."""
        headers, path = Headers(scope=scope), scope["path"]
        host = re.sub(r":[0-9]*$", "", headers.get("host", ""))  # without the port
        if self.hosts is not None and host.lower() not in self.hosts:
            raise Problem(403, f"the host {ascii(host)[:80]} is not served here; --allow-host adds a name")
        owner = self._owner(headers.get("authorization", "")) if self.keys and path not in OPEN else ""
        if self.draining:
            raise Problem(503, "the server is shutting down", headers={"Retry-After": "5", "Connection": "close"})
        if len(self.connections) > (most := self.limits.max_connections):
            raise Problem(503, f"more than {most} connections are open", headers={**BUSY, "Connection": "close"})
        if query := scope["query_string"]:
            raise Problem(400, f"there is no query parameter here, but {ascii(query)[1:80]}; send fields in the body")
        if (encoding := headers.get("content-encoding", "identity")) != "identity":
            raise Problem(400, f"the body has Content-Encoding {ascii(encoding)[:40]}; send it as it is")
        return owner

    def _owner(self, given: str) -> str:
        """Return a name for the key in a header, which browsers send as the password of Basic authentication."""
        kind, _, key = given.partition(" ")
        if kind.lower() == "basic":
            try:
                key = base64.b64decode(key, validate=True).decode().partition(":")[2]
            except (binascii.Error, UnicodeDecodeError):
                key = ""
        digest = hashlib.sha256(key.encode("utf-8", "replace")).digest()
        matches = [hmac.compare_digest(digest, known) for known in self.keys]  # all, so that time tells nothing
        if not any(matches):
            what = "has an unknown API key" if key else "lacks an API key"
            raise Problem(
                401, f"the request {what}; send 'Authorization: Bearer KEY'", code="invalid_api_key",
                headers={"WWW-Authenticate": 'Basic realm="gptcore: the password is an API key"'},
            )  # fmt: skip
        return digest.hex()

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        """Return the body. Raises Problem for one that is too large or too slow."""
        length = headers.get("content-length", "0")
        chunks, size, limit = [], 0, self.limits.max_body_bytes
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.limits.client_seconds
        while True:
            try:
                message = await asyncio.wait_for(receive(), deadline - loop.time())
            except asyncio.TimeoutError:
                text = f"the body was not there after {self.limits.client_seconds:g} seconds"
                raise Problem(408, text, headers={"Connection": "close"}) from None
            if message["type"] == "http.disconnect":
                raise ConnectionError
            size += len(message.get("body", b""))
            if size <= limit:
                chunks.append(message.get("body", b""))
            more = message.get("more_body", False)
            if (size > limit and not more) or size > DISCARDED * limit or int(length) > DISCARDED * limit:
                given = f"{max(size, int(length)):,}"
                text = f"the body has {given} bytes or more, but this server takes {limit:,}"
                raise Problem(413, text, headers={"Connection": "close"})
            if not more:
                return b"".join(chunks)

    async def _run(self, scope: Scope, body: bytes, receive: Receive, answer: _Answer) -> None:
        """Run the application until it ends, the client goes away, or its time is over."""
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def once() -> Message:
            if messages:
                return messages.pop()
            await asyncio.Event().wait()  # the watch below cancels the application, which therefore need not ask
            raise AssertionError

        work = asyncio.ensure_future(self.app(scope, once, answer.send))
        gone = asyncio.ensure_future(_disconnect(receive))
        self._work.add(work)
        done: set[asyncio.Future[None]] = set()
        try:
            done, _ = await asyncio.wait(
                {work, gone}, timeout=self.limits.request_seconds, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            self._work.discard(work)
            for task in (gone, work):
                task.cancel()
            await asyncio.gather(gone, work, return_exceptions=True)
        if not done:
            text = f"the request took longer than {self.limits.request_seconds:g} seconds"
            raise Problem(504, text, headers={"x-should-retry": "false"})
        if work.cancelled():
            if gone not in done:
                raise Problem(503, "the server shut down before the request was done", headers=BUSY)
        elif (error := work.exception()) is not None and gone not in done:
            logger.error("request %s failed", answer.id, exc_info=error)
            raise Problem(500, f"the server failed at request {answer.id}; its log says why")

    def stop(self) -> None:
        """End all requests that are running, with 503."""
        for work in self._work:
            work.cancel()


class _Answer:
    """Sends a response with the headers that each has, and knows what was sent."""

    def __init__(self, send: Send) -> None:
        self._send, self.id = send, f"req_{uuid.uuid4().hex}"
        self.started = self.ended = self.is_stream = False
        self.status = "dropped"

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started, self.status = True, str(message["status"])
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.id
            for name, value in SECURITY_HEADERS.items():
                headers.setdefault(name, value)
            self.is_stream = headers.get("content-type", "").startswith("text/event-stream")
        elif message["type"] == "http.response.body":
            self.ended = not message.get("more_body", False)
        await self._send(message)

    async def fail(self, problem: Problem, scope: Scope) -> None:
        """Send the error: as a response, or as the last event of a stream. Else the connection just ends."""
        if not self.started:
            await _respond(problem.response(), scope, self.send)
        elif self.is_stream and not self.ended:
            await self.send({"type": "http.response.body", "body": problem.event(), "more_body": False})


async def _respond(response: Response, scope: Scope, send: Send) -> None:
    async def nothing() -> Any:
        raise AssertionError("a response that is complete reads nothing")

    await response(scope, nothing, send)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
