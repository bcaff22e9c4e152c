"""Threads follow physical cores, affinity and the container's quota. Cached kernels have a bound."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch

from lorakit.models import processor
from lorakit.models.processor import (
    KERNELS,
    in_own_thread,
    limit_kernels,
    limit_threads,
    usable_cores,
)


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Eight CPUs of which n and n + 4 share a core, without a quota; the process may use them all."""
    for cpu in range(8):
        folder = tmp_path / f"cpus/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    (tmp_path / "cgroup").mkdir()
    monkeypatch.setattr(processor, "_CPUS", tmp_path / "cpus")
    monkeypatch.setattr(processor, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    return tmp_path / "cgroup"


def test_two_threads_of_a_core_count_once(system: Path) -> None:
    assert usable_cores() == 4


def test_affinity(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {1, 5, 6}, raising=False)
    assert usable_cores() == 2


@pytest.mark.parametrize(
    ("content", "expected"),
    [("max 100000", 4), ("250000 100000", 3), ("50000 100000", 1), ("900000 100000", 4), ("?", 4)],
)
def test_quota_of_version_2(system: Path, content: str, expected: int) -> None:
    (system / "cpu.max").write_text(f"{content}\n")
    assert usable_cores() == expected


@pytest.mark.parametrize(("quota", "expected"), [("-1", 4), ("0", 4), ("200000", 2)])
def test_quota_of_version_1(system: Path, quota: str, expected: int) -> None:
    (system / "cpu").mkdir()
    (system / "cpu/cpu.cfs_quota_us").write_text(quota)
    (system / "cpu/cpu.cfs_period_us").write_text("100000")
    assert usable_cores() == expected


@pytest.mark.parametrize(
    ("threads", "variable", "expected"), [(8, None, 4), (3, None, 3), (8, "OMP_NUM_THREADS", 8)]
)
def test_threads_are_lowered_with_a_line(
    system: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    threads: int,
    variable: str | None,
    expected: int,
) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, str(threads))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with caplog.at_level(logging.WARNING, logger="lorakit"):
            limit_threads()
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)
    lines = [record.getMessage() for record in caplog.records]
    if expected == threads:
        assert lines == []
    else:
        assert lines[0].startswith("torch would use 8 threads, but this process may use 4 physical")


def test_the_environment_decides_on_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"LRU_CACHE_CAPACITY": "7"}
    monkeypatch.setattr("os.environ", environment)
    limit_kernels()
    assert environment == {
        "LRU_CACHE_CAPACITY": "7",
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(KERNELS),
    }


GROWTH = """
import json, psutil, torch
from lorakit.models import processor

def growth(first, last):
    before = psutil.Process().memory_info().rss
    for rows in range(first, last):
        x[:rows] @ W
    return psutil.Process().memory_info().rss - before

x, W = (torch.ones(n, 64, dtype=torch.bfloat16) for n in (520, 64))
processor.KERNELS = 64
processor.limit_kernels()
print(json.dumps([growth(8, 72), growth(72, 520)]))
"""
"""Multiply matrices of many sizes; print by how much the first 64 and the other 448 make the process grow."""


@pytest.mark.slow
def test_cached_kernels_have_a_bound() -> None:
    """Without it, the second growth is seven times the first. Replaced kernels leave some holes in the heap."""
    environment = {name: os.environ[name] for name in os.environ if "CACHE_CAPACITY" not in name}
    command = [sys.executable, "-c", GROWTH]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout)
    assert second < 3 * first + 10 * 2**20


THREADS = """
import contextvars, json, os, time, torch
from lorakit.models.processor import in_own_thread

choice = contextvars.ContextVar("choice", default=0)
choice.set(3)

def count():
    return len(os.listdir("/proc/self/task"))

def multiply():
    torch.randn(512, 512) @ torch.randn(512, 512)
    return count(), choice.get()

before = count()
inside, chosen = in_own_thread(multiply)
try:
    in_own_thread(lambda: [][0])
except IndexError as error:
    failed = str(error)
until = time.monotonic() + 20
while count() > before and time.monotonic() < until:  # a thread leaves the list a moment after its end
    time.sleep(0.01)
print(json.dumps([before, inside, count(), chosen, failed]))
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_a_thread_of_its_own_ends_with_its_computing_threads() -> None:
    """Threads that stay would make those of a server's engine sleep between operations."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", THREADS]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    before, inside, after, chosen, failed = json.loads(done.stdout)
    assert inside == before + 2
    assert after == before
    assert chosen == 3
    assert failed == "list index out of range"


def test_a_wait_for_the_thread_can_be_interrupted_on_windows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There, Ctrl-C acts between two waits and never within one."""
    waits = []
    join = threading.Thread.join

    def noted(thread: threading.Thread, timeout: float | None = None) -> None:
        waits.append(timeout)
        join(thread, timeout)

    monkeypatch.setattr(threading.Thread, "join", noted)
    assert in_own_thread(lambda: time.sleep(0.01) or 7) == 7
    assert waits
    assert all(timeout is not None and timeout < 1 for timeout in waits)


def test_a_failed_action_leaves_no_tensor_behind() -> None:
    """Python collects cycles of old objects rarely, so the tensors of a failed load would stay for long."""
    tensors = []

    def fail() -> None:
        tensor = torch.zeros(2)
        tensors.append(weakref.ref(tensor))
        raise MemoryError("too large")

    gc.disable()
    try:
        with contextlib.suppress(MemoryError):
            in_own_thread(fail)
        assert tensors[0]() is None
    finally:
        gc.enable()
