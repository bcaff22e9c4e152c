"""Quantities as people read them, and scores by their names."""

from __future__ import annotations

from lorakit.evaluation.score import DIRECTIONS, is_better
from lorakit.tasks import TASKS

SCORE_NAMES = {
    "loss": "Loss",
    "perplexity": "Perplexity",
    "bleu": "BLEU",
    "rouge_l": "ROUGE-L",
    "accuracy": "Accuracy",
    "f1": "F1",
    "matthews": "Matthews correlation",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
    "mse": "Mean squared error",
}


def score_name(key: str) -> str:
    """A score's name in the field's spelling."""
    return SCORE_NAMES.get(key, key.replace("_", " "))


def better(key: str, new: float, old: float) -> bool | None:
    """Whether `new` improves on `old`; None where they are equal or the direction is not known."""
    own = {score for task in TASKS.values() for score in task.scores}
    if new == old or key not in {*DIRECTIONS, *own}:
        return None
    less = [score for task in TASKS.values() for score in task.less_is_better]
    return is_better(key, new, old, less_is_better=less)


def change(new: float, old: float) -> str:
    """The way from one value to the other, absolute and, where they have one sign, relative."""
    by = f"{new - old:+.4g}"
    return f"{by} ({(new - old) / abs(old):+.1%})" if new * old > 0 else by
