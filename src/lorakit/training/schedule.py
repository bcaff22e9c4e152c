"""The learning rate and the examples of each step.

Both depend on the step number only, so a checkpoint stores a step number instead of the state of an iterator.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

from lorakit.training.config import Schedule

Batches = list[list[int]]
"""Indices of the examples in each batch."""


def rate_factor(step: int, *, total: int, warmup: float, schedule: Schedule) -> float:
    """Return the factor on the peak learning rate at `step`, counted from 0.

    The factor of the first step is 1 / warm-up steps, and no step within `total` has factor 0.

    Args:
        step: Number of finished steps.
        total: Number of steps in the run.
        warmup: Share of `total` if below 1, else a number of steps.
        schedule: Shape of the decay after the warm-up.
    """
    rise = math.ceil(warmup * total) if warmup < 1 else int(warmup)
    if step < rise:
        return (step + 1) / rise
    remaining = (total - step) / max(total - rise, 1)  # from 1 after the warm-up to almost 0
    if schedule == "cosine":
        return 0.5 * (1 - math.cos(math.pi * remaining))
    return remaining if schedule == "linear" else 1.0


class StepPlan:
    """The examples of each optimizer step: one batch of the sampler, cut into batches that fit into memory.

    The sampler draws the examples of whole steps, so the cut does not change the examples of a step. A step does not
    cross the end of an epoch, so one step of an epoch may have fewer examples. Its loss is still the mean over its
    targets.

    Args:
        sampler: Returns the examples of each step of an epoch.
        batch_size: Examples per forward and backward pass.
        epochs: Length of the run, in passes over the data.
        max_steps: Length of the run, in steps; overrides `epochs`.
    """

    def __init__(
        self,
        sampler: Callable[[int], Batches],
        *,
        batch_size: int,
        epochs: float,
        max_steps: int | None,
    ) -> None:
        self._sampler = sampler
        self._batch_size = batch_size
        self.steps_per_epoch = len(sampler(0))
        self.total = max_steps or max(1, round(epochs * self.steps_per_epoch))

    def steps(self, start: int = 0) -> Iterator[Batches]:
        """Yield the batches of each step, from step `start` to the end of the run."""
        first_epoch, skipped = divmod(start, self.steps_per_epoch)
        endless = (
            examples for epoch in itertools.count(first_epoch) for examples in self._sampler(epoch)
        )
        for examples in itertools.islice(endless, skipped, skipped + self.total - start):
            yield [
                examples[at : at + self._batch_size]
                for at in range(0, len(examples), self._batch_size)
            ]
