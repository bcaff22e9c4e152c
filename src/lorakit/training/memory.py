"""The most memory that a run held, also where a process makes several runs one after another."""

from __future__ import annotations

import ctypes
import gc
import sys
from contextlib import suppress

import torch

_STATUS, _CLEAR = "/proc/self/status", "/proc/self/clear_refs"


def restart_peak() -> None:
    """Let :func:`peak_memory` count from now on, without what earlier runs of this process have left behind.

    Linux and CUDA forget their high-water mark when asked to. Elsewhere, and in a container that forbids it, the mark
    of the whole process stays: an upper bound.
    """
    gc.collect()  # a model's modules refer to each other, so that the last run's may still be there
    give_back()
    with suppress(OSError), open(_CLEAR, "w", encoding="ascii") as file:
        file.write("5")  # man 5 proc_pid_clear_refs
    if torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)


def give_back() -> None:
    """Give the system back the memory that was freed, as far as the C library can.

    It keeps it for later tensors. But between them stand kernels that were prepared for batches of other sizes, and a
    larger tensor fits into none of the holes: after some hundred batches they are half of what a process holds.
    """
    with suppress(OSError, AttributeError):  # glibc's alone
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory(device: torch.device) -> int:
    """Return the largest memory in bytes since `restart_peak`: the GPU's allocations, or the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with (
        suppress(OSError, StopIteration),
        open(_STATUS, encoding="ascii", errors="replace") as file,
    ):
        # Not getrusage, whose figure may be that of the program which started this process by exec.
        line = next(line for line in file if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset  # type: ignore[attr-defined]
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
