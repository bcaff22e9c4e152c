"""The order in which requests wait for memory for their adapters.

An adapter that a request uses cannot be unloaded, so a request for another one may have to wait until some have ended.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from lorakit.serving.errors import StoreFullError

T = TypeVar("T")

PATIENCE = 1.0
"""Seconds that the first one waits while newer requests overtake it, because their adapters are loaded. After that they
wait behind it, or popular adapters would stay in use for ever."""


@dataclass(eq=False)
class _Waiter:
    since: float
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class Room:
    """First come, first served, among the requests of one event loop.

    Args:
        is_in_use: Returns whether any request holds adapters. If none does, waiting would not help.
    """

    def __init__(self, is_in_use: Callable[[], bool]) -> None:
        self._is_in_use = is_in_use
        self._waiting: deque[_Waiter] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def acquire(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Return what `attempt` returns, once there is room.

        Raises:
            StoreFullError: There is no room although no request holds adapters.
        """
        self._loop = loop = asyncio.get_running_loop()
        may_overtake = not self._waiting or loop.time() - self._waiting[0].since < PATIENCE
        if may_overtake and (found := await self._try(attempt)):
            return found[0]
        own = _Waiter(loop.time())
        self._waiting.append(own)
        try:
            while True:
                own.changed.clear()
                if self._waiting[0] is own and (found := await self._try(attempt)):
                    return found[0]
                await own.changed.wait()
        finally:
            self._waiting.remove(own)
            self._wake()

    async def _try(self, attempt: Callable[[], Awaitable[T]]) -> tuple[T] | None:
        """Return what `attempt` returns, in a tuple; None if there is no room while requests hold adapters.

        Raises:
            StoreFullError: There is no room although no request holds adapters.
        """
        for is_last in (False, True):
            try:
                return (await attempt(),)
            except StoreFullError:
                if self._is_in_use():
                    break
                if is_last:
                    raise
                # Adapters that were in use during the attempt may have been given back since: try once more.
        return None

    def released(self) -> None:
        """Let the first one try again, after a request has given back its adapters; from any thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        if self._waiting:
            self._waiting[0].changed.set()
