"""Requests wait in order for memory for their adapters."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeEngine
from own_loop import run
from stores import LORA, open_base, size_of_one, write_adapter

from lorakit.models.loading import Base
from lorakit.serving import adapter_memory_queue
from lorakit.serving.adapter_memory_queue import AdapterMemoryQueue
from lorakit.serving.errors import StoreFullError
from lorakit.serving.folders import Location
from lorakit.serving.http.app import create_app
from lorakit.serving.http.state import THREADS, RequestRecord
from lorakit.serving.preparing import prepare
from lorakit.serving.serve_config import ServeConfig
from lorakit.serving.store import AdapterStore


class Memory:
    """Memory for two adapters."""

    def __init__(self, size: int = 2) -> None:
        self.size, self.held, self.order = size, [], []
        self.queue = AdapterMemoryQueue()

    async def use(self, name: str) -> None:
        async def attempt() -> None:
            if name not in self.held and len(set(self.held)) >= self.size:
                raise StoreFullError("full")
            self.held.append(name)

        await self.queue.acquire(attempt)
        self.order.append(name)

    def release(self, name: str) -> None:
        self.held.remove(name)
        self.queue.freed()


async def waiting_in(own: AdapterMemoryQueue, count: int) -> None:
    """Wait until as many requests wait for memory."""
    for _ in range(500):
        if len(own._waiting) == count:
            return
        await asyncio.sleep(0.01)
    pytest.fail("the requests do not wait")


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_the_first_that_waits_is_the_first_that_is_served(monkeypatch):
    monkeypatch.setattr(adapter_memory_queue, "PATIENCE", 0)

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


def test_memory_that_becomes_free_during_a_failed_attempt_is_found():
    async def play() -> None:
        memory = Memory(size=1)
        await memory.use("a")
        waiting = asyncio.create_task(memory.use("b"))
        await settle()
        attempts: list[int] = []

        async def attempt() -> None:
            attempts.append(len(memory.held))
            if len(attempts) > 1 and memory.held:
                memory.release(memory.held[0])  # after this attempt has looked for memory
                await settle()
            if attempts[-1]:
                raise StoreFullError("full")

        last = asyncio.create_task(memory.queue.acquire(attempt))
        await settle()
        memory.release("a")
        await asyncio.wait_for(asyncio.gather(waiting, last), 5)
        assert attempts == [1, 1, 0]

    run(play())


@pytest.mark.parametrize("ends", ["is served", "fails", "is cancelled"])
def test_adapters_of_a_blend_that_is_still_read_are_in_use(
    root: Path, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    """A request that waits for their memory is served as soon as the blend has ended, in any way."""
    write_adapter(root / "big", method=dataclasses.replace(LORA, rank=4))
    store = AdapterStore(open_base(), root, budget=3 * size_of_one(root))
    serving = create_app(FakeEngine(), store, ServeConfig(), base_name="base").state.serving
    begun, go = threading.Event(), threading.Event()

    def slow(base: Base, location: Location, **options: Any) -> Any:
        if location.path.endswith("/c"):
            begun.set()
            assert go.wait(10)
            if ends != "is served":
                raise MemoryError
        return prepare(base, location, **options)

    monkeypatch.setattr("lorakit.serving.store.prepare", slow)

    async def ask(model: str, lora: dict[str, float] | None = None) -> None:
        record = RequestRecord("id", 0.0)
        lease, _ = await serving.acquire_and_prepare(record, lambda lease: None, model, lora)
        serving.release(lease)

    async def play() -> None:
        blend = asyncio.create_task(ask("base", {"a": 0.4, "b": 0.3, "c": 0.3}))
        await asyncio.to_thread(begun.wait, 10)
        other = asyncio.create_task(ask("big"))
        await waiting_in(serving.memory_queue, 1)
        if ends == "is cancelled":
            blend.cancel()
            await asyncio.sleep(0.1)  # the other one tries again, in vain
        go.set()
        await asyncio.wait_for(asyncio.gather(other, blend, return_exceptions=True), 5)
        assert other.exception() is None
        await asyncio.to_thread(serving.loaders.shutdown)
        assert (serving.computing, store.stats().leases) == (0, 0)

    run(play())


def test_the_base_and_pinned_adapters_overtake_those_that_wait(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They hold no memory that another request could have."""
    monkeypatch.setattr(adapter_memory_queue, "PATIENCE", 0)
    store = AdapterStore(open_base(), root, budget=2 * size_of_one(root), pinned=["a"])
    serving = create_app(FakeEngine(), store, ServeConfig(), base_name="base").state.serving

    async def ask(model: str, lora: dict[str, float] | None = None) -> Any:
        lease, _ = await serving.acquire_and_prepare(
            RequestRecord("id", 0.0), lambda lease: None, model, lora
        )
        return lease

    async def play() -> None:
        in_use = await ask("b")
        waiting: list[asyncio.Task[Any]] = []
        for name in "cb":
            waiting.append(asyncio.create_task(ask(name)))
            await waiting_in(serving.memory_queue, len(waiting))
        for model, lora in (("base", None), ("a", None), ("base", {"a": 0.5})):
            serving.release(await asyncio.wait_for(ask(model, lora), 5))
        assert len(serving.memory_queue._waiting) == 2
        serving.release(in_use)
        for task in waiting:
            serving.release(await asyncio.wait_for(task, 5))

    run(play())


def test_the_base_and_pinned_adapters_do_not_wait_while_another_is_read(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Enough requests for one adapter wait for it to fill all threads; and then enough long prompts to fill theirs."""
    store = AdapterStore(open_base(), root, budget=10**9, pinned=["a"])
    serving = create_app(FakeEngine(), store, ServeConfig(), base_name="base").state.serving
    go, begun, acquire = threading.Event(), list[str](), store.acquire

    def slow(*args: Any, **options: Any) -> Any:
        assert go.wait(60)
        return prepare(*args, **options)

    def counted(choice: Any) -> Any:
        begun.append(choice)
        return acquire(choice)

    def render(lease: Any) -> None:
        begun.append("rendering")
        assert go.wait(60)

    monkeypatch.setattr("lorakit.serving.store.prepare", slow)
    monkeypatch.setattr(store, "acquire", counted)

    async def ask(model: str, prepare: Any = lambda lease: None) -> None:
        lease, _ = await serving.acquire_and_prepare(RequestRecord("id", 0.0), prepare, model)
        serving.release(lease)

    async def fill(name: str, *args: Any) -> list[asyncio.Task[None]]:
        tasks = [asyncio.create_task(ask(*args)) for _ in range(THREADS)]
        while begun.count(name) < THREADS:
            await asyncio.sleep(0.01)
        return tasks

    async def play() -> None:
        try:
            waiting = await fill("b", "b")
            for model in ("base", "a"):
                await asyncio.wait_for(ask(model), 20)
            waiting += await fill("rendering", "base", render)
            await asyncio.wait_for(serving.in_worker(serving.metrics.page), 20)
        finally:
            go.set()
        await asyncio.gather(*waiting)

    run(play())
