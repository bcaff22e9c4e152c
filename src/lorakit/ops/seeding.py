"""Random numbers of a known seed that leave no trace in the global random state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch


@contextmanager
def seeded(seed: int | None, devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Draw from this seed inside the block, on the CPU and on `devices`; the global generators stay as they were.

    Other devices are not touched: `torch.manual_seed` would seed them all, and `torch.random.fork_rng` starts
    them all where it is not told which.

    Args:
        seed: None draws from the global generators.
        devices: Where numbers are drawn beside the CPU.
    """
    if seed is None:
        yield
        return
    with ExitStack() as forks:
        forks.enter_context(_seeded_cpu(seed))
        for device in set(devices):
            if device.type not in ("cpu", "meta"):
                forks.enter_context(_seeded_device(seed, device))
        yield


@contextmanager
def _seeded_cpu(seed: int) -> Iterator[None]:
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


@contextmanager
def _seeded_device(seed: int, device: torch.device) -> Iterator[None]:
    module: Any = torch.get_device_module(device)

    def current() -> AbstractContextManager[Any]:
        # The functions of a module mean its current device; of mps there is one.
        return getattr(module, "device", nullcontext)(device)

    with current():
        state = module.get_rng_state()
        module.manual_seed(seed)
    try:
        yield
    finally:
        with current():
            module.set_rng_state(state)
