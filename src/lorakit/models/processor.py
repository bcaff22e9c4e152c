"""The processor of this machine: its name, its threads, and the kernels that it caches."""

from __future__ import annotations

import functools
import logging
import math
import os
import platform
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from contextvars import copy_context
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")

_LOG = logging.getLogger(__name__)

KERNELS = 512
"""Matrix products whose kernels stay in memory. PyTorch's default is 1,024, and no batch size is ever forgotten: each
shape of a product by oneDNN takes 0.6 MB, on a processor with matrix units up to 3 MB. A step has 30 to 50 shapes, so
512 hold the latest 10 to 17 batch sizes; to build the kernels of another one takes under 1 % of its step."""

_KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""oneDNN's cache of kernels and PyTorch's cache of their descriptions, each of which keeps half of those bytes."""

_CPUS = Path("/sys/devices/system/cpu")
_CGROUPS = Path("/sys/fs/cgroup")


@functools.cache
def processor_name() -> str:
    """Return the processor's name. On Linux only /proc has it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return (
                next(line for line in file if line.startswith("model name")).split(":")[1].strip()
            )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Return the physical cores that this process may use, by its affinity and its container's quota.

    The second thread of a core shares its arithmetic units, so it does not speed up matrix products.
    """
    cpus = (
        os.sched_getaffinity(0)
        if hasattr(os, "sched_getaffinity")
        else set(range(os.cpu_count() or 1))
    )
    cores = len({_core_of(cpu) for cpu in cpus})
    return max(1, math.ceil(min(cores, _quota())))


def limit_processor() -> None:
    """Limit threads and cached kernels, before the first computation on a CPU."""
    limit_threads()
    limit_kernels()


def limit_threads() -> None:
    """Lower the number of torch's threads to the usable cores, and log a line if that changes it.

    Does nothing if the environment sets OMP_NUM_THREADS or MKL_NUM_THREADS.
    """
    if any(name in os.environ for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")):
        return
    threads, cores = torch.get_num_threads(), usable_cores()
    if threads > cores:
        torch.set_num_threads(cores)
        _LOG.warning(
            "torch would use %d threads, but this process may use %d physical cores; it now uses %d threads. "
            "OMP_NUM_THREADS sets another number.",
            threads,
            cores,
            cores,
        )


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with `count` threads of torch inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def limit_kernels() -> None:
    """Lower the number of kernels that PyTorch's CPU library caches, unless the environment sets it.

    oneDNN reads the environment at its first product, so this has no effect in a process that has multiplied bfloat16
    matrices before.
    """
    for name in _KERNEL_CACHES:
        os.environ.setdefault(name, str(KERNELS))


def in_own_thread(action: Callable[[], T]) -> T:
    """Run an action in a thread that ends with it, and return its result.

    A thread that computes starts a pool of OpenMP threads, which ends with that thread. While the pools have more
    threads than the machine has CPUs, those of GNU OpenMP sleep between two operations: decoding steps on two cores
    then took 1.6 times as long. So a server computes in one thread, and in others only by this function.
    """
    future: Future[T] = Future()
    context = copy_context()

    def run(future: Future[T]) -> None:
        try:
            future.set_result(context.run(action))
        except BaseException as error:
            future.set_exception(error)
        finally:
            del future  # see below

    # A daemon, so that Ctrl-C does not wait for it.
    thread = threading.Thread(target=run, args=(future,), name="lorakit-passing", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)  # on Windows, Ctrl-C does not interrupt a join without a timeout
    try:
        return future.result()
    finally:
        # An error's traceback has these frames: a cycle would keep the tensors of the failed action.
        del future


def _core_of(cpu: int) -> str:
    """Return the threads of a CPU's physical core, or the CPU itself where the system does not tell."""
    try:
        return (_CPUS / f"cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _quota() -> float:
    """Return the CPUs that control groups (version 2 or 1) let this process use; infinite without a quota."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        with suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = " ".join((_CGROUPS / name).read_text() for name in names).split()
            # Without a quota it is "max" in version 2, and -1 or 0 in version 1.
            return math.inf if quota in ("max", "-1", "0") else int(quota) / int(period)
    return math.inf
