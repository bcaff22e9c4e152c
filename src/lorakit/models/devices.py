"""The device that a setting names, and PyTorch's module for it."""

from __future__ import annotations

from typing import Any

import psutil
import torch

from lorakit.errors import ConfigurationError


def pick_device(name: str) -> torch.device:
    """Return the device for the setting ``base.device``; ``auto`` is a CUDA GPU if there is one, else the CPU.

    Raises:
        ConfigurationError: This machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError):  # which one depends on how torch was built
        device = None
    # torch accepts any index of the CPU.
    if device is None or (device.type == "cpu" and device.index):
        raise ConfigurationError(
            f"base.device is {name!r}, but this torch sees no such device. Write auto or cpu."
        )
    return device


def device_exists(device: torch.device) -> bool:
    """Return whether this machine has a CUDA GPU of this index; True for other devices."""
    return device.type != "cuda" or (device.index or 0) < torch.cuda.device_count()


def available_memory(device: torch.device) -> int | None:
    """Return the bytes of memory that are free on a CPU or a CUDA GPU; None for other devices.

    Memory that PyTorch has reserved on a GPU and does not use counts as free.
    """
    if device.type == "cpu":
        return psutil.virtual_memory().available
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def accelerator_module() -> Any:
    """Return PyTorch's module for this machine's accelerator, such as `torch.cuda`; `torch.cpu` if there is none.

    The modules differ in the functions that they have.
    """
    return torch.get_device_module(torch.accelerator.current_accelerator() or torch.device("cpu"))
