"""The memory of the store: which adapters leave, which requests wait, and that leases keep their content."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from safetensors.torch import load_file
from stores import (
    LARGE,
    LORA,
    TENSORS,
    alone,
    answer,
    engine_thread,
    join_collector,
    open_base,
    same_tensors,
    settle,
    size_of_one,
    tensors_on_model,
    write_adapter,
)

from lorakit.errors import AdapterFileError, AdapterStateError
from lorakit.models.loading import Base
from lorakit.serving import folders
from lorakit.serving.errors import StoreFullError, UnknownAdapterError
from lorakit.serving.preparing import prepare
from lorakit.serving.store import AdapterStore, Lease

# --- the budget ---------------------------------------------------------------------------------------


def test_eviction_never_takes_an_adapter_in_use(root: Path) -> None:
    store = AdapterStore(open_base(), root, budget=2 * size_of_one(root))
    in_use = store.acquire("a")
    expected = answer(store, in_use)
    for name in "bcdbcd":
        store.acquire(name).release()
        assert store.stats().loaded == 2
        assert in_use.blend[0][0] in store.handle.names
    torch.testing.assert_close(answer(store, in_use), expected)
    assert store.stats().evictions == 5
    other = store.acquire("b")
    with pytest.raises(StoreFullError, match="--adapter_memory"):
        store.acquire("c")
    torch.testing.assert_close(answer(store, in_use), expected)
    other.release()
    store.acquire("c").release()  # the error is not remembered
    assert store.stats().bytes <= store.budget


def test_the_least_recently_used_one_leaves(root: Path) -> None:
    store = AdapterStore(open_base(), root, budget=2 * size_of_one(root))
    for name in "abac":
        store.acquire(name).release()
    assert [store.describe(name)["loaded"] for name in "abc"] == [True, False, True]


def test_pinned_adapters_are_loaded_from_the_start_and_stay(root: Path) -> None:
    store = AdapterStore(open_base(), root, budget=2 * size_of_one(root), pinned=["a"])
    assert (store.stats().loads, store.describe("a")["loaded"]) == (1, True)
    for name in "bcdb":
        store.acquire(name).release()
    assert store.describe("a")["loaded"]
    with pytest.raises(AdapterFileError, match="Raise --adapter_memory"):
        AdapterStore(open_base(), root, budget=100, pinned=["a"])
    with pytest.raises(UnknownAdapterError):
        AdapterStore(open_base(), root, budget=LARGE, pinned=["none"])


def test_a_pinned_adapter_makes_room_for_its_new_content(root: Path) -> None:
    store = AdapterStore(open_base(), root, budget=size_of_one(root), pinned=["a"])
    write_adapter(root / "a", seed=9)
    with store.acquire("a") as lease:
        torch.testing.assert_close(answer(store, lease), alone(root / "a"))


def test_a_request_without_room_reads_its_adapter_once_before_it_loads_it(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: (
            reads.append(original.__name__),
            original(*args, **kwargs),
        )[1]

    store = AdapterStore(open_base(), root, budget=size_of_one(root))
    in_use = store.acquire("a")
    monkeypatch.setattr("lorakit.serving.store.prepare", counted(prepare))
    monkeypatch.setattr(folders, "digests_of", counted(folders.digests_of))
    for _ in range(5):
        with pytest.raises(StoreFullError):
            store.acquire("b")
    assert reads == ["digests_of", "prepare"]
    in_use.release()
    store.acquire("b").release()
    assert reads == ["digests_of", "prepare"] * 2


@pytest.mark.parametrize(
    ("adapters", "pinned", "choice"),
    [(1, "", "big"), (2, "a", "big"), (2, "", {"a": 0.5, "b": 0.25, "c": 0.25})],
    ids=["larger than the budget", "beside a pinned one", "a blend"],
)
def test_what_can_never_fit_does_not_wait_for_other_requests(
    root: Path, adapters: int, pinned: str, choice: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter(root / "big", method=dataclasses.replace(LORA, rank=4))
    store = AdapterStore(open_base(), root, budget=adapters * size_of_one(root), pinned=[*pinned])
    with store.acquire("a"):
        for _ in range(2):
            with pytest.raises(AdapterFileError, match=r"needs .*, more than the .* occupy"):
                store.acquire(choice)
            monkeypatch.setattr(
                "lorakit.serving.store.prepare", lambda *_, **__: pytest.fail("read")
            )
    assert store.stats().leases == 0


def test_two_threads_load_an_adapter_once(store: AdapterStore) -> None:
    begin, leases = threading.Barrier(4), []

    def acquire() -> None:
        begin.wait()
        leases.append(store.acquire("a"))

    threads = [threading.Thread(target=acquire) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.stats().loads == 1
    assert store.stats().leases == 4
    assert len({lease.blend for lease in leases}) == 1
    for lease in leases:
        lease.release()
    assert store.stats().leases == 0


def test_loading_one_adapter_does_not_block_another(root: Path) -> None:
    """An engine whose step takes long, and a lease that is released in its thread."""
    may_change, waits = threading.Event(), threading.Event()

    def between_steps(action: Callable[[], Any]) -> Any:
        waits.set()
        assert may_change.wait(10)
        return action()

    store = AdapterStore(open_base(), root, budget=LARGE, pinned=["a"], between_steps=between_steps)
    loading = threading.Thread(target=lambda: store.acquire("b").release())
    loading.start()
    assert waits.wait(10)
    began = time.perf_counter()
    lease = store.acquire("a")
    lease.release()
    assert time.perf_counter() - began < 1
    may_change.set()
    loading.join(10)
    assert store.describe("b")["loaded"]


def test_a_lease_is_released_in_the_engines_thread_without_waiting_for_it(root: Path) -> None:
    """The engine runs changes in its own thread, so a release there must not wait for a change."""
    with engine_thread() as in_engine:
        store = AdapterStore(open_base(), root, budget=LARGE, between_steps=in_engine)
        lease = store.acquire("a")
        store.remove("a")
        in_engine(lease.release)
        settle(store)
        assert store.stats().bytes == 0


def test_unloading_does_not_wait_for_the_engine(root: Path) -> None:
    may_change = threading.Event()

    def between_steps(action: Callable[[], Any]) -> Any:
        assert may_change.wait(60)
        return action()

    store = AdapterStore(
        open_base(), root, budget=LARGE, pinned=["a", "b"], between_steps=between_steps
    )
    unloading = threading.Thread(target=lambda: [store.remove(name) for name in "ab"], daemon=True)
    unloading.start()
    unloading.join(30)
    assert not unloading.is_alive()
    assert store.stats().loaded == 2
    may_change.set()
    join_collector(store)
    assert (store.stats().loaded, store.stats().bytes) == (0, 0)


@pytest.mark.parametrize("when", ["before the step", "after the step"])
def test_an_adapter_whose_last_request_ends_while_another_leaves_the_model_leaves_too(
    root: Path, when: str
) -> None:
    others: list[Lease] = []

    def release_others() -> None:
        for lease in others:
            lease.release()

    def between_steps(action: Callable[[], Any]) -> Any:
        if when == "before the step":
            release_others()
        result = action()
        if when == "after the step":
            release_others()
        return result

    store = AdapterStore(open_base(), root, budget=LARGE, between_steps=between_steps)
    first, second = store.acquire("a"), store.acquire("b")
    store.remove("a")
    store.remove("b")
    others.append(second)
    first.release()
    join_collector(store)
    assert (store.stats().loaded, store.stats().bytes, store.handle.names) == (0, 0, ())


def test_an_engine_that_has_died_does_not_make_an_adapter_bad(root: Path) -> None:
    dead = True

    def between_steps(action: Callable[[], Any]) -> Any:
        if dead:
            raise AdapterStateError("the engine has died")
        return action()

    store = AdapterStore(open_base(), root, budget=LARGE, between_steps=between_steps)
    with pytest.raises(AdapterStateError, match="has died"):
        store.acquire("a")
    assert store.stats().bytes == 0
    dead = False
    store.acquire("a").release()


# --- all of it in any order -----------------------------------------------------------------------------


class StoreMachine(RuleBasedStateMachine):
    """Names, contents and leases in any order: the tensors of each lease are those of the file when it was taken."""

    NAMES = "xyz"

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.root = self.folder / "root"
        self.root.mkdir()
        self.store = AdapterStore(self.base, self.root, budget=2 * self.size + 10)
        self.files: dict[str, int] = {}
        """Content of each folder."""
        self.withdrawn: set[str] = set()
        self.seconds = 0
        self.leases: list[tuple[Lease, int]] = []

    contents: Path
    base: Base
    size: int
    tensors: list[dict[str, torch.Tensor]]

    @property
    def known(self) -> set[str]:
        return self.files.keys() - self.withdrawn

    @rule(name=st.sampled_from(NAMES), content=st.integers(0, 3), in_place=st.booleans())
    def write(self, name: str, content: int, in_place: bool) -> None:
        folder = self.root / name
        if in_place and folder.exists():
            for file in (self.contents / "abcd"[content]).iterdir():
                (folder / file.name).write_bytes(file.read_bytes())
        else:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(self.contents / "abcd"[content], folder)
        self.seconds += 1
        for file in folder.iterdir():  # a clock may be too coarse to tell two writes apart
            os.utime(file, (self.seconds, self.seconds))
        self.files[name] = content
        self.withdrawn.discard(name)

    @rule(name=st.sampled_from(NAMES))
    def delete(self, name: str) -> None:
        shutil.rmtree(self.root / name, ignore_errors=True)
        self.files.pop(name, None)

    @rule(name=st.sampled_from(NAMES))
    def remove(self, name: str) -> None:
        if name in self.known:
            self.store.remove(name)
            self.withdrawn.add(name)
        else:
            with pytest.raises(UnknownAdapterError):
                self.store.remove(name)

    @rule(name=st.sampled_from(NAMES))
    def add(self, name: str) -> None:
        if name not in self.files:
            with pytest.raises(AdapterFileError):
                self.store.add(name, name, replace=True)
            return
        try:
            self.store.add(name, name, replace=True)
        except StoreFullError:
            assert len({content for _, content in self.leases}) == 2
            return
        self.withdrawn.discard(name)

    @rule(name=st.sampled_from(NAMES))
    def acquire(self, name: str) -> None:
        if name not in self.known:
            with pytest.raises(UnknownAdapterError):
                self.store.acquire(name)
            return
        content, in_use = self.files[name], {content for _, content in self.leases}
        try:
            lease = self.store.acquire(name)
        except StoreFullError:
            assert content not in in_use
            assert len(in_use) == 2
            return
        self.leases.append((lease, content))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        lease, _ = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        lease.release()

    @invariant()
    def leases_keep_their_content(self) -> None:
        for lease, content in self.leases:
            assert same_tensors(tensors_on_model(self.store, lease), self.tensors[content])

    @invariant()
    def books_balance(self) -> None:
        settle(self.store)
        stats = self.store.stats()
        assert stats.loaded == len(self.store.handle.names) <= 2
        assert stats.bytes == self.size * stats.loaded
        assert stats.leases == len(self.leases)
        assert set(self.store.names()) == self.known

    def teardown(self) -> None:
        for lease, _ in self.leases:
            lease.release()
        self.store.handle.detach()
        shutil.rmtree(self.folder)


@pytest.mark.slow
def test_leases_keep_their_content_in_any_order_of_changes(made: Path) -> None:
    StoreMachine.contents, StoreMachine.base = made, open_base()
    StoreMachine.size = size_of_one(made)
    StoreMachine.tensors = [load_file(made / name / TENSORS) for name in "abcd"]
    run_state_machine_as_test(
        StoreMachine, settings=settings(max_examples=8, stateful_step_count=20)
    )


@pytest.mark.slow
def test_threads_that_load_while_the_model_runs_get_their_own_answers(root: Path) -> None:
    """An engine runs passes of the leases it is given; other threads acquire, replace, remove and add."""
    errors: list[BaseException] = []
    expected = {name: alone(root / name) for name in "abcd"}
    with engine_thread() as in_engine:
        store = AdapterStore(
            open_base(), root, budget=3 * size_of_one(root), between_steps=in_engine
        )

        def request(seed: int) -> None:
            draw = random.Random(seed)
            try:
                for _ in range(40):
                    name = draw.choice("abcd")
                    try:
                        lease = store.acquire(name)
                    except (StoreFullError, UnknownAdapterError):
                        continue

                    def compute(lease: Lease = lease) -> torch.Tensor:
                        logits = answer(store, lease)
                        if draw.random() < 0.5:
                            lease.release()
                        return logits

                    torch.testing.assert_close(in_engine(compute), expected[name])
                    lease.release()
                    if draw.random() < 0.2:
                        with suppress(UnknownAdapterError, StoreFullError, AdapterStateError):
                            store.remove(name)
                            store.add(name, name)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=request, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        settle(store)
    assert not errors, errors[0]
    assert store.stats().leases == 0
    assert store.stats().loaded == len(store.handle.names)
    assert store.stats().bytes <= store.budget
