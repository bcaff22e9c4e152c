"""Random numbers in training.

Each batch seeds the generators, so checkpoints need no random states: a resumed run draws the same dropout masks.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from lorakit.ops.seeding import seed_device, seeded
from lorakit.training.job import Job


@contextmanager
def own_generators(seed: int, device: torch.device) -> Iterator[None]:
    """Seed PyTorch's generators inside the block, and restore afterwards all that training seeds for its batches.

    These are the global generators of Python, NumPy, PyTorch's CPU and `device`.
    """
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with seeded(seed, [device]):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def seed_batch(job: Job, step: int, number: int) -> None:
    """Seed the global generators for the batch `number` of this process in a step, for its forward and backward pass.

    Models may use the generators of Python and NumPy too.
    """
    rank = job.processes.rank
    text = f"noise, seed {job.config.seed}, step {step}, process {rank}, batch {number}"
    seed = random.Random(text).getrandbits(32)
    for device in {torch.device("cpu"), job.device}:
        seed_device(seed, device)
    random.seed(seed)
    np.random.seed(seed)
