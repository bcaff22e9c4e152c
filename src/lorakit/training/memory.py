"""Peak memory of each run, also when one process makes several runs."""

from __future__ import annotations

import ctypes
import gc
import sys
from contextlib import suppress

import torch


def reset_peak_memory() -> None:
    """Reset :func:`peak_memory` to the current memory, after freeing the memory of earlier runs.

    Linux and CUDA can reset their high-water mark. On other systems, and in containers that forbid the reset,
    :func:`peak_memory` returns the mark of the whole process, an upper bound.
    """
    gc.collect()  # modules refer to each other, so the last run's model may still be alive
    release_free_memory()
    with suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # man 5 proc_pid_clear_refs
    if torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)


def release_free_memory() -> None:
    """Return freed heap memory to the system, if the C library supports it.

    The C library keeps freed memory for later tensors. Cached kernels for other batch sizes fragment the heap, so
    larger tensors do not fit into the holes. After some hundred batches, the holes are half of the process's memory.
    """
    with suppress(OSError, AttributeError):  # only glibc has malloc_trim
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory(device: torch.device) -> int:
    """Return the peak memory since `reset_peak_memory`, in bytes: GPU allocations, or on a CPU the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with (
        suppress(OSError, StopIteration),
        open("/proc/self/status", encoding="ascii", errors="replace") as file,
    ):
        # getrusage may return the peak of the program that started this process by exec.
        line = next(line for line in file if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset  # type: ignore[attr-defined]
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
