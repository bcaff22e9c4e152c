"""Requests wait in order for memory for their adapters."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest

from lorakit.serving import room
from lorakit.serving.errors import StoreFullError
from lorakit.serving.room import Room

T = TypeVar("T")


class Memory:
    """Room for two adapters."""

    def __init__(self, size: int = 2) -> None:
        self.size, self.held, self.order = size, [], []
        self.room = Room(lambda: bool(self.held))

    async def use(self, name: str) -> None:
        async def attempt() -> None:
            if name not in self.held and len(set(self.held)) >= self.size:
                raise StoreFullError("full")
            self.held.append(name)

        await self.room.acquire(attempt)
        self.order.append(name)

    def release(self, name: str) -> None:
        self.held.remove(name)
        self.room.released()


def run(play: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in a thread of its own: another test may leave an event loop running in this one."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, play).result()


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_the_first_that_waits_is_the_first_that_is_served(monkeypatch):
    monkeypatch.setattr(room, "PATIENCE", 0)

    async def play() -> list[str]:
        memory = Memory()
        tasks = [asyncio.create_task(memory.use(name)) for name in ("a", "b", "c", "a", "d")]
        await settle()
        assert memory.order == ["a", "b"]  # the second "a" does not overtake "c"
        for name, order in (("b", "abca"), ("a", "abca"), ("c", "abcad")):
            memory.release(name)
            await settle()
            assert memory.order == list(order)
        await asyncio.gather(*tasks)
        return memory.order

    assert run(play()) == list("abcad")


def test_loaded_adapters_overtake_for_a_while():
    async def play() -> None:
        memory = Memory()
        tasks = [asyncio.create_task(memory.use(name)) for name in ("a", "b", "c", "a")]
        await settle()
        assert memory.order == ["a", "b", "a"]
        memory.release("b")
        await asyncio.gather(*tasks)
        assert memory.order == ["a", "b", "a", "c"]

    run(play())


def test_one_that_gives_up_lets_the_next_one_try():
    async def play() -> None:
        memory = Memory()
        tasks = [asyncio.create_task(memory.use(name)) for name in ("a", "b", "c", "d")]
        await settle()
        tasks[2].cancel()
        memory.release("a")
        await tasks[3]
        assert memory.order == ["a", "b", "d"]

    run(play())


@pytest.mark.parametrize("waits", [False, True])
def test_room_that_becomes_free_after_a_failed_attempt_is_found(waits):
    async def play() -> None:
        memory = Memory(size=1)
        await memory.use("a")

        async def attempt() -> None:
            if "a" in memory.held:
                if not waits or attempts:
                    memory.held.remove(
                        "a"
                    )  # given back between this attempt and the look at `held`
                attempts.append(False)
                raise StoreFullError("full")
            attempts.append(True)

        attempts: list[bool] = []
        await asyncio.wait_for(memory.room.acquire(attempt), 5)
        assert attempts == ([False, False, True] if waits else [False, True])

    run(play())


def test_waiting_for_nothing_is_an_error():
    async def play() -> None:
        memory = Memory(size=0)
        with pytest.raises(StoreFullError):
            await asyncio.wait_for(memory.use("a"), 5)

    run(play())
