"""Names, directions and changes of scores."""

from __future__ import annotations

from lorakit.evaluation.score import DIRECTIONS, is_better
from lorakit.formatting import number, percentage
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
    """Return the usual spelling of a score's name."""
    return SCORE_NAMES.get(key, key.replace("_", " "))


def better(key: str, new: float, old: float) -> bool | None:
    """Return whether `new` is better than `old`; None if they are equal or the direction is unknown."""
    task_scores = {score for task in TASKS.values() for score in task.scores}
    if new == old or key not in {*DIRECTIONS, *task_scores}:
        return None
    less_is_better = [score for task in TASKS.values() for score in task.less_is_better]
    return is_better(key, new, old, less_is_better=less_is_better)


def change(new: float, old: float) -> str:
    """Return the absolute difference, and the relative one if both values have the same sign."""
    absolute = number(new - old, sign=True)
    if new * old <= 0:
        return absolute
    return f"{absolute} ({percentage(new - old, abs(old), sign=True)})"
