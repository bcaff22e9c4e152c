"""Queue of requests that wait for memory for their adapters.

An adapter that a request uses cannot be unloaded, so a request for another one may have to wait until some have ended.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

from lorakit.serving.errors import StoreFullError

T = TypeVar("T")

PATIENCE = 1.0
"""Seconds that newer requests whose adapters are loaded may overtake the first one of the queue. After that they wait
behind it. Otherwise popular adapters would stay in use for ever."""


@dataclass(eq=False)
class _Waiter:
    since: float
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class AdapterMemoryQueue:
    """First-come, first-served queue for the requests of one event loop."""

    def __init__(self) -> None:
        self._waiting: deque[_Waiter] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def acquire(self, attempt: Callable[[], Awaitable[T]], *, overtakes: bool = False) -> T:
        """Return what `attempt` returns, once it raises no StoreFullError any more.

        Args:
            attempt: Acquires adapters.
            overtakes: Whether to try at once although others wait, because it keeps no memory that they need.
        """
        self._loop = loop = asyncio.get_running_loop()
        if overtakes or not self._waiting or loop.time() - self._waiting[0].since < PATIENCE:
            try:
                return await attempt()
            except BaseException as error:
                self._wake()  # the attempt may have held some adapters of a blend
                if not isinstance(error, StoreFullError):
                    raise
        own = _Waiter(loop.time())
        self._waiting.append(own)
        try:
            while True:
                own.changed.clear()
                if self._waiting[0] is own:
                    with suppress(StoreFullError):
                        return await attempt()
                await own.changed.wait()
        finally:
            self._waiting.remove(own)
            self._wake()

    def freed(self) -> None:
        """Let the first one try again, because adapters may be idle now; from any thread."""
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        if self._waiting:
            self._waiting[0].changed.set()
