"""Peak memory of each run, also when one process makes several runs."""

from __future__ import annotations

import ctypes
import gc
import sys
from contextlib import suppress

import torch

from lorakit.models.devices import accelerator_module


def reset_peak_memory() -> None:
    """Reset :func:`peak_memory` to the current memory, after freeing the memory of earlier runs.

    Linux and most GPUs can reset their high-water mark. On other systems, and in containers that forbid the reset,
    :func:`peak_memory` returns the mark of the whole process, an upper bound.
    """
    gc.collect()  # modules refer to each other, so the last run's model may still be alive
    trim_heap()
    with suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # man 5 proc_pid_clear_refs
    module = accelerator_module()
    reset = getattr(module, "reset_peak_memory_stats", None)
    if reset and module.is_initialized():
        for index in range(module.device_count()):
            reset(index)


def trim_heap() -> None:
    """Return freed heap memory to the system, if the C library supports it.

    The C library keeps freed memory for later tensors. Cached kernels for other batch sizes fragment the heap, so
    larger tensors do not fit into the holes. After some hundred batches, the holes are half of the process's memory.
    """
    # Only glibc has malloc_trim. On Windows, CDLL(None) is a TypeError.
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory(device: torch.device) -> int:
    """Return the peak memory since `reset_peak_memory`, in bytes.

    The peak of a GPU's allocations; of the process's resident set on a CPU, and on a GPU whose allocations have no
    recorded peak (mps).
    """
    if measure := getattr(torch.get_device_module(device), "max_memory_allocated", None):
        return measure(device)
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
