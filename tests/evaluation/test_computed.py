"""Processes that share an evaluation run equally many forward passes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from lorakit.compute.batch_size import BatchSize
from lorakit.evaluation.computed import Workers, computed


def passes(count: int, examples: int, *, configured: int, size: int, halves: bool) -> list[int]:
    """Return the number of forward passes of each process, and require that all examples are computed once."""
    found, counted = [], 0

    def loss_sum(model: nn.Module, batch: Any) -> Any:
        found[-1] += 1
        return SimpleNamespace(item=lambda: 0.0)

    objective: Any = SimpleNamespace(loss_sum=loss_sum, count=len)
    texts: Any = ["x" * (1 + i % 7) for i in range(examples)]
    for rank in range(count):
        found.append(0)
        batch_size = BatchSize(configured, smaller="" if halves else "Set a smaller size.")
        batch_size.size = size
        batches = computed(
            nn.Identity(),
            objective,
            texts,
            list,  # type: ignore[arg-type] - a batch here is the list of its examples
            batch_size=batch_size,
            workers=Workers(rank, count),
        )
        counted += sum(batch.count for batch in batches)
    assert counted == examples
    return found


@pytest.mark.parametrize("size", [16, 8])
@pytest.mark.parametrize(("count", "examples"), [(2, 500), (4, 500), (2, 12), (4, 1)])
def test_processes_with_sharded_weights_run_equally_many_passes(
    count: int, examples: int, size: int
) -> None:
    """Also with the smaller size that an earlier session without sharded weights needed."""
    assert len({*passes(count, examples, configured=16, size=size, halves=False)}) == 1


def test_processes_that_halve_their_own_size_share_parts_of_the_configured_one() -> None:
    assert passes(2, 64, configured=16, size=4, halves=True) == [8, 8]
