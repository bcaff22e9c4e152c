"""Scores of the generic tasks, and their directions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

DIRECTIONS: dict[str, Literal["min", "max"]] = {
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
"""Whether lower ("min") or higher ("max") is better, for each score of the generic tasks."""


def is_better(
    score: str, new: float, old: float | None, *, less_is_better: Sequence[str] = ()
) -> bool:
    """Return whether `new` is better than `old` in the direction of `score`; NaN is never better.

    For a task's own scores higher is better, unless `less_is_better` names them.
    """
    if math.isnan(new):
        return False
    lower = score in less_is_better or DIRECTIONS.get(score) == "min"
    return old is None or (new < old if lower else new > old)
