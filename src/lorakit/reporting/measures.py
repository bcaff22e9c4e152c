"""Quantities as people read them, and scores by their names."""

from __future__ import annotations

from lorakit.evaluation.score import DIRECTIONS, is_better
from lorakit.tasks import TASKS
from lorakit.training.progress import duration

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


def parameters(count: float) -> str:
    """A number of parameters as 460.8 thousand or 135 million."""
    for least, word in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if count >= least:
            return f"{count / least:.4g} {word}"
    return f"{count:.0f}"


def seconds(value: float) -> str:
    """A time as 85 ms, 4.2 s or 2h 05m."""
    if value < 1:
        return f"{value * 1000:.0f} ms"
    return f"{value:.1f} s" if value < 60 else duration(value)


def share(part: float, whole: float) -> str:
    """A part of a whole in percent, with two digits that mean something."""
    percent = 100 * part / whole
    return f"{percent:.1f} %" if percent >= 10 else f"{percent:.2g} %"


def change(new: float, old: float) -> str:
    """The way from one value to the other, absolute and, where they have one sign, relative."""
    by = f"{new - old:+.4g}"
    return f"{by} ({(new - old) / abs(old):+.1%})" if new * old > 0 else by
