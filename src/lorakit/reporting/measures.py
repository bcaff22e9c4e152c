"""Names and changes of scores."""

from __future__ import annotations

from lorakit.formatting import number, percentage

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


def change(new: float, old: float) -> str:
    """Return the absolute difference, and the relative one if both values have the same sign."""
    absolute = number(new - old, sign=True)
    if new * old <= 0:
        return absolute
    return f"{absolute} ({percentage(new - old, abs(old), sign=True)})"
