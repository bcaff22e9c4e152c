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
    if seed is None:
        yield
        return
    with ExitStack() as forks:
        forks.enter_context(torch.random.fork_rng(devices=()))
        torch.default_generator.manual_seed(seed)
        for device in set(devices):
            if device.type not in ("cpu", "meta"):
                forks.enter_context(_seeded_device(seed, device))
        yield


@contextmanager
def _seeded_device(seed: int, device: torch.device) -> Iterator[None]:
    with _generator(device) as module:
        state = module.get_rng_state()
        module.manual_seed(seed)
    try:
        yield
    finally:
        with _generator(device) as module:
            module.set_rng_state(state)


def seed_device(seed: int, device: torch.device) -> None:
    """Seed the global generator of `device`, and no other."""
    if device.type == "cpu":
        # torch.manual_seed formats a traceback for each device without use.
        torch.default_generator.manual_seed(seed)
        return
    with _generator(device) as module:
        module.manual_seed(seed)


@contextmanager
def _generator(device: torch.device) -> Iterator[Any]:
    """Return the module whose functions act on the generator of `device` inside the block."""
    module: Any = torch.get_device_module(device)
    # They act on the module's current device. mps has a single device.
    with getattr(module, "device", nullcontext)(device):
        yield module
