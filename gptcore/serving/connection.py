"""Connections and shutdown: what uvicorn leaves open to slow clients, and SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from gptcore.serving.errors import Problem
from gptcore.serving.guard import Guard
from gptcore.serving.limits import HEADER_BYTES, Limits


class Connection(H11Protocol):
    """Closes the connection of a client that sends headers, or reads a response, too slowly.

    Also of one that sends a second request before the first is answered: uvicorn would read no further, and would not
    notice when that client goes away.
    """

    seconds = 10.0
    _headers: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._headers = self.loop.call_later(self.seconds, transport.abort)

    def data_received(self, data: bytes) -> None:
        before, answering = self.cycle, self.cycle is not None and not self.cycle.response_complete
        if answering and not self.cycle.more_body:
            self.transport.abort()
            return
        if self._headers is None and not answering:  # the first bytes of another request
            self._headers = self.loop.call_later(self.seconds, self.transport.abort)
        super().data_received(data)
        if self._headers is not None and self.cycle is not before:  # its headers are there
            self._headers.cancel()
            self._headers = None
        if self.cycle is not before and not self.cycle.more_body and self.conn.trailing_data[0]:
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP as uvicorn does, in the shape that errors have."""
        response = Problem(400, msg, headers={"Connection": "close"}).response()
        start = h11.Response(status_code=400, headers=response.raw_headers, reason=b"Bad Request")
        with contextlib.suppress(h11.LocalProtocolError):  # another response has begun
            for event in (start, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reading = self.loop.call_later(self.seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reading is not None:
            self._reading.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._headers, self._reading):
            if timer is not None:
                timer.cancel()


class Server(uvicorn.Server):
    """Drains after the first SIGTERM or SIGINT: new requests get 503, running ones finish within limits.drain_seconds.

    A second signal ends at once.
    """

    def __init__(self, app: Any, guard: Guard, limits: Limits, **settings: Any) -> None:
        protocol = type("LimitedConnection", (Connection,), {"seconds": limits.client_seconds})
        config = uvicorn.Config(
            app, http=protocol, ws="none", lifespan="off", h11_max_incomplete_event_size=HEADER_BYTES,
            timeout_graceful_shutdown=1, server_header=False, proxy_headers=False, **settings,
        )  # fmt: skip
        super().__init__(config)
        guard.connections = self.server_state.connections
        self.guard, self.limits, self.since = guard, limits, 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.guard.draining:
            self.should_exit = self.force_exit = True
        self.guard.draining = True
        if sig == signal.SIGINT:  # uvicorn raises it again at the end, so that the exit status says Ctrl-C
            self._captured_signals.append(sig)

    async def on_tick(self, counter: int) -> bool:
        if self.guard.draining:
            now = asyncio.get_running_loop().time()
            self.since = self.since or now
            if now - self.since >= self.limits.drain_seconds:
                self.guard.stop()
            if not self.guard.running:
                self.should_exit = True
        return await super().on_tick(counter)
