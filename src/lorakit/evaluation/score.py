"""Directions of scores: whether lower or higher is better."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from lorakit.tasks import Task

Direction = Literal["min", "max"]
"""Whether lower ("min") or higher ("max") is better."""

DIRECTIONS: dict[str, Direction] = {
    "loss": "min",
    "perplexity": "min",
    "bleu": "max",
    "rouge_l": "max",
    "accuracy": "max",
    "f1": "max",
    "matthews": "max",
    "pearson": "max",
    "spearman": "max",
    "mse": "min",
}
"""The direction of each score of the generic tasks."""


def directions_of(task: type[Task]) -> dict[str, Direction]:
    """Return the directions of the generic scores and of a task's own.

    For its own scores higher is better, unless `less_is_better` names them.
    """
    names = (*DIRECTIONS, *task.scores, *task.quick_scores)
    lower = {name for name in names if name in task.less_is_better or DIRECTIONS.get(name) == "min"}
    return {name: "min" if name in lower else "max" for name in names}


def is_better(new: float, old: float | None, direction: Direction) -> bool:
    """Return whether `new` is better than `old`: NaN never is, and any other number is better than None."""
    if math.isnan(new):
        return False
    return old is None or (new < old if direction == "min" else new > old)
