"""The learning rate over time, and which examples each step sees: both functions of the step number alone.

That is what makes a run resumable: a checkpoint needs to hold a step number, not the inside of an iterator.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

from lorakit.training.config import Schedule

Batches = list[list[int]]
"""Numbers of the examples in each batch."""


def rate_factor(step: int, *, total: int, warmup: float, schedule: Schedule) -> float:
    """Return the factor on the peak learning rate at `step`, counted from 0.

    The first step already moves the weights (factor 1 / warm-up steps), and no step within `total` has factor 0.

    Args:
        step: Number of finished steps.
        total: Number of steps of the run.
        warmup: Share of `total` if below 1, else a number of steps.
        schedule: Course after the warm-up.
    """
    rise = math.ceil(warmup * total) if warmup < 1 else int(warmup)
    if step < rise:
        return (step + 1) / rise
    left = (total - step) / max(total - rise, 1)
    if schedule == "cosine":
        return 0.5 * (1 - math.cos(math.pi * left))
    return left if schedule == "linear" else 1.0


class StepPlan:
    """The examples of each optimizer step: a sampler's batches, `accumulation` of them at a time.

    A step does not reach over the end of an epoch, so the last of an epoch may hold fewer batches; the loss stays
    right, since it is a mean over the targets that are there.
    """

    def __init__(
        self,
        sampler: Callable[[int], Batches],
        *,
        accumulation: int,
        epochs: float,
        max_steps: int | None,
    ) -> None:
        self._sampler = sampler
        self._accumulation = accumulation
        self.steps_per_epoch = math.ceil(len(sampler(0)) / accumulation)
        self.total = max_steps or max(1, round(epochs * self.steps_per_epoch))

    def epoch(self, step: int) -> float:
        """Return the number of passes over the data that `step` finished steps make."""
        return step / self.steps_per_epoch

    def steps(self, start: int = 0) -> Iterator[Batches]:
        """Yield the batches of each step from number `start` to the end of the run."""
        first_epoch, skipped = divmod(start, self.steps_per_epoch)
        endless = (
            batches[position : position + self._accumulation]
            for epoch in itertools.count(first_epoch)
            for batches in [self._sampler(epoch)]
            for position in range(0, len(batches), self._accumulation)
        )
        return itertools.islice(endless, skipped, skipped + self.total - start)
