"""`lorakit serve` as a process, over HTTP with streaming."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from benchmarks.server_process import ServerProcess
from benchmarks.serving_load import Answer, Request, closed_loop, wait_until
from benchmarks.systems.serving import Setup

NAME = "lorakit serve, over HTTP"


def start(setup: Setup, options: Sequence[str] = ()) -> LorakitHttp:
    """Start the server, with further options of `lorakit serve`."""
    return LorakitHttp(setup, options)


class LorakitHttp:
    """A client with one connection per request in flight, in an event loop of its own."""

    name = NAME

    def __init__(self, setup: Setup, options: Sequence[str]) -> None:
        self._scratch = TemporaryDirectory()
        self._server = ServerProcess(
            setup.base,
            setup.adapters,
            Path(self._scratch.name) / "log",
            options=["--base.dtype", setup.dtype, *options],
            threads=setup.threads,
        )
        self._base_name = self._server.base_name
        self._loop = asyncio.new_event_loop()
        self._tasks: set[Any] = set()
        self._client = httpx.AsyncClient(
            base_url=self._server.url,
            timeout=httpx.Timeout(600),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=512),
        )
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def prepare(self, adapters: Sequence[str]) -> None:
        """Send one short request to each adapter."""
        closed_loop(self, [Request((1, 2, 3), name, 1) for name in adapters], 4, patience=300)

    def loads(self) -> float:
        """Return how many adapters the server has loaded since its start."""
        name = "lorakit_adapter_loads_total "
        lines = self._server.metrics().splitlines()
        return next(float(line.removeprefix(name)) for line in lines if line.startswith(name))

    def submit(self, request: Request, answer: Answer) -> None:
        """Start a streamed completion."""
        task = asyncio.run_coroutine_threadsafe(self._complete(request, answer), self._loop)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def drain(self) -> None:
        """Disconnect all unfinished requests."""
        for task in list(self._tasks):
            task.cancel()
        wait_until(lambda: not self._tasks)

    def stop(self) -> None:
        """End the server and the client."""
        self._server.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._scratch.cleanup()

    async def _complete(self, request: Request, answer: Answer) -> None:
        body = {
            "model": request.adapter or self._base_name,
            "prompt": list(request.prompt),
            "max_tokens": request.tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        error: str | None = "NoEnd"
        try:
            async with self._client.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != 200:
                    error = f"HTTP {response.status_code}"
                    return
                async for line in response.aiter_lines():
                    if line == "data: [DONE]":
                        error = None
                    elif line.startswith("data: "):
                        error = _read(json.loads(line[6:]), answer) or error
        except httpx.HTTPError as failure:
            error = type(failure).__name__
        except asyncio.CancelledError:
            error = "Cancelled"
        finally:
            answer.end(error)


def _read(chunk: dict[str, Any], answer: Answer) -> str | None:
    """Record the tokens of a chunk; return the kind of an error that it reports."""
    if "error" in chunk:
        return str(chunk["error"].get("type", "error"))
    if chunk.get("usage"):
        # A token without a text of its own (half a character) has no chunk. It arrived with a later one.
        for _ in range(chunk["usage"]["completion_tokens"] - len(answer.times)):
            answer.token()
    elif any(choice.get("text") for choice in chunk.get("choices", [])):
        answer.token()
    return None
