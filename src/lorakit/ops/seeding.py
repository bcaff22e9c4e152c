"""Seeded random numbers that leave the global random state unchanged."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch

from lorakit.errors import LorakitError

_TRAINING = [threading.RLock()]
"""Held by the thread that trains. A forked process replaces it: it does not have the thread."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _TRAINING.__setitem__(0, threading.RLock()))


@contextmanager
def in_one_thread() -> Iterator[None]:
    """Let one thread of the process train or plan at a time. Blocks of that thread can be nested.

    A run seeds the global random generators and replaces torch's dropout: each of two runs would change the other.

    Raises:
        LorakitError: Another thread is inside such a block.
    """
    (lock,) = _TRAINING
    if not lock.acquire(blocking=False):
        raise LorakitError(
            "Another thread of this process trains or plans. That seeds the global random generators and replaces "
            "torch's dropout in the whole process. Start each run in a process of its own."
        )
    try:
        yield
    finally:
        lock.release()


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
