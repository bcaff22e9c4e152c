"""Seeded random numbers that leave the global random state unchanged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch


@contextmanager
def seeded(seed: int | None, devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Seed the CPU and `devices` inside the block, and restore their global generators afterwards.

    No other device is touched. `torch.manual_seed` would seed all devices, and `torch.random.fork_rng` initialises
    all devices unless it gets a list.

    Args:
        seed: None draws from the global generators.
        devices: Devices to seed in addition to the CPU.
    """
    with ExitStack() as restored:
        if seed is not None:
            for device in {torch.device("cpu"), *devices} - {torch.device("meta")}:
                state = _call_generator(device, "get_rng_state")
                restored.callback(_call_generator, device, "set_rng_state", state)
                seed_device(seed, device)
        yield


def seed_device(seed: int, device: torch.device) -> None:
    """Seed the global generator of `device`, and no other."""
    if device.type == "cpu":
        # torch.manual_seed formats a traceback for each device without use.
        torch.default_generator.manual_seed(seed)
    else:
        _call_generator(device, "manual_seed", seed)


def _call_generator(device: torch.device, function: str, *args: Any) -> Any:
    """Call a function of the global generator of `device`."""
    if device.type == "cpu":
        return getattr(torch, function)(*args)
    module: Any = torch.get_device_module(device)
    # The function acts on the module's current device. mps has a single device.
    with getattr(module, "device", nullcontext)(device):
        return getattr(module, function)(*args)
