"""Compute the losses and logits of examples, in batches that fit into memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lorakit.compute.batch_size import BatchSize
from lorakit.compute.batching import Collate
from lorakit.compute.mode import evaluating
from lorakit.compute.objective import LabelLoss, Objective
from lorakit.data.batches import cut
from lorakit.tasks import Example

Progress = Callable[[str, int, int], None]
"""Called with what is done, such as "examples scored", how many are done, and their total."""

T = TypeVar("T")


@dataclass(frozen=True)
class Workers:
    """The processes that share an evaluation, with the rank of this one; by default it is the only one."""

    rank: int = 0
    count: int = 1
    gather: Callable[[Any], list[Any]] = lambda own: [own]
    """Returns the values of all processes, by rank."""

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return the items that this process computes: each `count`-th, from `rank` on."""
        return items[self.rank :: self.count]


ALONE = Workers()


@dataclass(frozen=True)
class ComputedBatch:
    """The summed loss and the number of targets of a batch; with labels, also its logits."""

    loss: float
    count: int
    logits: Mapping[int, list[float]] = field(default_factory=dict)
    """By the place of the example."""


def computed(
    model: nn.Module,
    objective: Objective,
    examples: Sequence[Example],
    collate: Collate,
    *,
    batch_size: BatchSize,
    progress: Progress = lambda *_: None,
    workers: Workers = ALONE,
) -> list[ComputedBatch]:
    """Compute all examples, in batches that fit into memory.

    The `workers` share the batches, and all of them return the same result. All run as many forward passes, because
    those of a model that is sharded over the processes need all of them. A process with fewer batches repeats one,
    which does not count.
    """
    # Sorted by length, so that batches hold little padding. The order is fixed, so the sum is reproducible.
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]))
    own: list[ComputedBatch] = []
    size = batch_size.in_all  # all processes must cut the same parts
    starts = range(0, len(order), size)
    own_starts = workers.share(starts)
    with evaluating(model):
        for start in own_starts:
            chosen = order[start : start + size]
            own += batch_size.fit(
                functools.partial(_part, model, objective, examples, collate, batch_size, chosen),
                lengths=[len(examples[i]) for i in chosen],
                during="the scoring of examples",
            )
            progress("examples scored", start + len(chosen), len(order))
        for _ in range(-(-len(starts) // workers.count) - len(own_starts)):
            objective.loss_sum(model, collate([examples[order[0]]]))
    return [batch for part_of_one in workers.gather(own) for batch in part_of_one]


def logits_of(batches: Sequence[ComputedBatch]) -> Tensor:
    """Return the logits (examples, outputs) of labelled examples in their order, in float32."""
    rows = {place: row for batch in batches for place, row in batch.logits.items()}
    return torch.tensor([rows[i] for i in range(len(rows))])


def _part(
    model: nn.Module,
    objective: Objective,
    examples: Sequence[Example],
    collate: Collate,
    batch_size: BatchSize,
    chosen: list[int],
) -> list[ComputedBatch]:
    """Compute the chosen examples, in batches that fit into memory."""
    parts = []
    for places in cut(chosen, batch_size.size):
        batch = collate([examples[i] for i in places])
        count = objective.count(batch)
        if isinstance(objective, LabelLoss):
            logits = objective.predict(model, batch)
            loss = objective.loss_of(logits, batch["labels"]).item()
            rows = dict(zip(places, logits.float().tolist(), strict=True))
            parts.append(ComputedBatch(loss, count, rows))
        else:
            parts.append(ComputedBatch(objective.loss_sum(model, batch).item(), count))
    return parts
