"""Run the application by uvicorn, with an orderly end."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from lorakit.serving.http.state import Serving

MAX_CONNECTIONS = 1024
"""Open connections, uvicorn's limit_concurrency: it answers more with 503. Each may hold a body of max_body bytes."""
BACKLOG = 1024
"""Connections that wait to be accepted."""
HEADER_SECONDS = 20.0
"""Seconds until a request's line and headers have arrived, and in which a client reads some of its answer; up to twice
as many."""
HEADER_BYTES = 32_768
"""Bytes of a request's line and headers, uvicorn's h11_max_incomplete_event_size."""
IDLE_SECONDS = 30
"""Most seconds that an idle connection stays open, uvicorn's timeout_keep_alive. `TimedProtocol` closes it after
HEADER_SECONDS to twice as many."""

END_SECONDS = 60
"""Seconds in which clients read the rest of their answers after the last one is computed."""


class TimedProtocol(H11Protocol):
    """Closes a connection on which nothing useful happens for a while. uvicorn itself would wait for ever.

    That is a connection without a whole request, one that sends on with a body whose request is answered, and one
    whose client reads nothing of its answer.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to watch the connection."""
        super().connection_made(transport)
        self._watch(None)

    def _watch(self, last: tuple[object, bool, int] | None) -> None:
        """Close the connection if it is idle, or its client reads nothing, as at the last look."""
        is_idle = self.conn.their_state is h11.IDLE or self.conn.our_state is h11.DONE
        unread = self.transport.get_write_buffer_size()
        seen = self.cycle, is_idle, unread
        if seen == last and unread:
            self.transport.abort()  # `close` would wait for the client
            return
        if seen == last and is_idle:
            self.transport.close()
        self._timer = self.loop.call_later(HEADER_SECONDS, self._watch, seen)

    def _unsupported_upgrade_warning(self) -> None:
        """Ignore the offer of another protocol. Java's client offers HTTP/2 in each request, and needs no answer."""

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop watching."""
        self._timer.cancel()
        super().connection_lost(exc)


class Server(uvicorn.Server):
    """Finishes what runs at the first signal, and ends at once at the second."""

    def __init__(self, config: uvicorn.Config, serving: Serving) -> None:
        super().__init__(config)
        self._serving = serving

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal; uvicorn's own handler would refuse new connections without an answer."""
        if self._serving.is_draining:
            self.should_exit = self.force_exit = True
        self._serving.is_draining = True

    async def on_tick(self, counter: int) -> bool:
        """End once the last request is answered; uvicorn calls this ten times a second."""
        if self._serving.is_draining and not self._serving.in_flight:
            self.should_exit = True
        return await super().on_tick(counter)


def run(
    app: FastAPI, listener: socket.socket, *, started: Callable[[], Any], access_log: bool = False
) -> None:
    """Answer requests until SIGTERM or Ctrl-C, then finish those that run.

    Args:
        app: The application.
        listener: A bound socket. It listens once everything is open, so that nobody waits for a start that fails.
        started: Called once the server answers.
        access_log: Log a line for each request.
    """
    config = uvicorn.Config(
        app,
        http=TimedProtocol,
        loop="asyncio",  # the same one where uvloop is installed
        ws="none",
        lifespan="off",
        log_level="info" if access_log else "warning",
        access_log=access_log,
        h11_max_incomplete_event_size=HEADER_BYTES,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=END_SECONDS,
        server_header=False,
    )
    server = Server(config, app.state.serving)
    listener.listen(BACKLOG)
    started()
    server.run([listener])
