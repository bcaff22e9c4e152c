from __future__ import annotations

import contextlib
import dataclasses
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvicorn
from fakes import FakeEngine, FakeStore
from fastapi import FastAPI
from fastapi.testclient import TestClient

from lorakit.serving.http.app import create_app
from lorakit.serving.http.running import Server, TimedProtocol
from lorakit.serving.serve_config import ServeConfig

BASE = "tiny/base"
ANY_HOST = {"host": "0.0.0.0", "allow_public": True}
"""Options with which requests may have any Host header."""


@dataclasses.dataclass
class Served:
    """An application, its engine and store, and a client."""

    app: FastAPI
    engine: FakeEngine
    store: FakeStore
    client: TestClient
    server: Server | None = None
    thread: threading.Thread | None = None
    """These two are of `live`."""

    def post(self, path: str, **body: Any) -> Any:
        return self.client.post(path, json=body)

    def complete(self, **body: Any) -> Any:
        return self.post("/v1/completions", **{"model": "sql", "prompt": "The river", **body})

    def chat(self, content: Any = "Which pub?", **body: Any) -> Any:
        messages = [{"role": "user", "content": content}]
        return self.post("/v1/chat/completions", **{"model": "sql", "messages": messages, **body})

    def settle(self) -> None:
        """Wait until all requests have ended and all leases are released."""
        wait_for(lambda: self.app.state.serving.computing == 0 and self.store.all_released_once)


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not hold in time"
        time.sleep(0.005)


Serve = Callable[..., Served]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Make an application. At the end every lease must have been released exactly once."""
    made: list[Served] = []
    with contextlib.ExitStack() as stack:

        def make(
            *,
            engine: Any = None,
            store: Any = None,
            keys: Any = None,
            **options: Any,
        ) -> Served:
            engine, store = engine or FakeEngine(), store or FakeStore()
            config = ServeConfig(**{**ANY_HOST, **options})
            app = create_app(engine, store, config, base_name=BASE, keys=keys)
            client = stack.enter_context(TestClient(app, raise_server_exceptions=False))
            made.append(Served(app, engine, store, client))
            return made[-1]

        yield make
        for served in made:
            if served.engine.pause is not None:
                served.engine.pause.set()
            served.settle()


@pytest.fixture
def live() -> Iterator[Callable[[Served], str]]:
    """Serve an application by uvicorn, and return its address."""
    with contextlib.ExitStack() as stack:

        def start(served: Served, **options: Any) -> str:
            listener = socket.create_server(("127.0.0.1", 0))
            config = uvicorn.Config(
                served.app,
                log_level="error",
                http=TimedProtocol,
                ws="none",
                lifespan="off",
                **options,
            )
            served.server = server = Server(config, served.app.state.serving)
            thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
            thread.start()
            served.thread = thread
            wait_for(lambda: server.started)

            def stop() -> None:
                server.should_exit = True
                thread.join(10)
                listener.close()

            stack.callback(stop)
            return f"http://127.0.0.1:{listener.getsockname()[1]}"

        yield start
