"""The learning rate, the examples of each step, and the share of them that each process computes.

Both depend on the step number only, so a checkpoint stores a step number instead of the state of an iterator.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

from lorakit.compute.batch_size import BatchSize
from lorakit.data.batches import BatchSampler, cut
from lorakit.tasks import Example, LanguageExample
from lorakit.training.config import Schedule

Step = list[int]
"""Indices of the examples of an optimizer step, over all processes."""
Batches = list[list[int]]
"""Indices of the examples in each batch of a process."""


def rate_factor(step: int, *, total: int, warmup: float, schedule: Schedule) -> float:
    """Return the factor on the peak learning rate at `step`, counted from 0.

    The factor of the first step is 1 / warm-up steps, and no step within `total` has factor 0. `warmup` is a share of
    `total` if below 1, else a number of steps; `schedule` is the shape of the decay after it.
    """
    # 0.07 * 100 is 7.000000000000001.
    rise = math.ceil(round(warmup * total, 6)) if warmup < 1 else int(warmup)
    if step < rise:
        return (step + 1) / rise
    remaining = (total - step) / max(total - rise, 1)  # from 1 after the warm-up to almost 0
    if schedule == "cosine":
        return 0.5 * (1 - math.cos(math.pi * remaining))
    return remaining if schedule == "linear" else 1.0


class StepPlan:
    """The examples of each optimizer step, which `Share` cuts into batches.

    A step does not cross the end of an epoch, so one step of an epoch may have fewer examples. Its loss is still the
    mean over its targets. `max_steps` overrides `epochs`.
    """

    def __init__(self, sampler: BatchSampler, *, epochs: float, max_steps: int | None) -> None:
        self._sampler = sampler
        self.steps_per_epoch = len(sampler)
        self.total = max_steps or max(1, round(epochs * self.steps_per_epoch))

    def steps(self, start: int = 0) -> Iterator[Step]:
        """Yield the examples of each step, from step `start` to the end of the run."""
        first_epoch, skipped = divmod(start, self.steps_per_epoch)
        endless = itertools.chain.from_iterable(map(self._sampler, itertools.count(first_epoch)))
        return itertools.islice(endless, skipped, skipped + self.total - start)


class Share:
    """The examples of each step that one process computes. All processes have about the same number of tokens.

    The share of a single process is the whole step. A share is empty if a step has fewer examples than processes. With
    `packed`, examples with the same prompt stay together, because a packed batch computes their prompt once.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: BatchSize,
        rank: int = 0,
        count: int = 1,
        packed: bool = False,
    ) -> None:
        self._examples = examples
        self._batch_size = batch_size
        self._rank, self._count = rank, count
        self._packed = packed

    def __call__(self, step: Step) -> Batches:
        """Return the batches of this process. They have the present batch size."""
        return self.of_all(step)[self._rank]

    def of_all(self, step: Step) -> list[Batches]:
        """Return the batches of each process."""
        units = self._units(step)
        costs = [self._tokens(step[place] for place in unit) for unit in units]
        shares = even_shares(units, costs, self._count)
        return [
            cut([step[place] for place in sorted(share)], self._batch_size.size) for share in shares
        ]

    def _units(self, step: Step) -> list[list[int]]:
        """Return the places of examples that stay together, at most an even share of the step."""
        places = range(len(step))
        if not self._packed:
            return [[place] for place in places]
        by_prompt: dict[str, list[int]] = {}
        for place in places:
            by_prompt.setdefault(self._examples[step[place]].prompt, []).append(place)
        most = -(-len(step) // self._count)
        return [part for group in by_prompt.values() for part in cut(group, most)]

    def _tokens(self, unit: Iterable[int]) -> int:
        """Return the tokens that the model computes for examples with the same prompt."""
        examples = [self._examples[i] for i in unit]
        shared = examples[0].prompt_length if isinstance(examples[0], LanguageExample) else 0
        return sum(map(len, examples)) - (len(examples) - 1) * shared


def even_shares(
    units: Sequence[Sequence[int]], costs: Sequence[int], count: int
) -> list[list[int]]:
    """Distribute units over `count` shares of about the same cost, and if possible of the same number of items.

    The costliest unit comes first. Each goes into the share with the lowest cost among those with room for its items.
    """
    room = -(-sum(map(len, units)) // count)
    shares: list[list[int]] = [[] for _ in range(count)]
    totals = [0] * count
    for u in sorted(range(len(units)), key=lambda u: -costs[u]):
        open_shares = [s for s in range(count) if len(shares[s]) + len(units[u]) <= room]
        emptiest = min(open_shares or range(count), key=totals.__getitem__)
        shares[emptiest] += units[u]
        totals[emptiest] += costs[u]
    return shares
