"""The scores of the generic tasks, and which way each is better."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

Direction = Literal["min", "max"]

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
"""The scores of the generic tasks, and whether less or more of each is better."""


def is_better(
    score: str, new: float, old: float | None, *, less_is_better: Sequence[str] = ()
) -> bool:
    """Return whether `new` improves on `old` in the direction of `score`; NaN never does.

    A score of a task's own is better the higher it is, unless `less_is_better` names it.
    """
    if math.isnan(new):
        return False
    lower = score in less_is_better or DIRECTIONS.get(score) == "min"
    return old is None or (new < old if lower else new > old)
