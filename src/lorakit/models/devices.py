"""The device that a setting names."""

from __future__ import annotations

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
