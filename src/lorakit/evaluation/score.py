"""Scores of outputs against references: text overlap, classes, numbers. All by the field's own libraries."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

from lorakit.errors import ConfigurationError, DataError

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
"""Every score there is, and whether less or more of it is better."""

MISSING = "Scoring needs the 'train' extra ({error}). Install it: pip install 'lorakit[train]'."


def is_better(score: str, new: float, old: float | None) -> bool:
    """Return whether `new` improves on `old` in the direction of `score`; NaN never does."""
    if math.isnan(new):
        return False
    return old is None or (new < old if DIRECTIONS[score] == "min" else new > old)


def text_scores(
    outputs: Sequence[str], references: Sequence[Sequence[str]], *, lowercase: bool = True
) -> dict[str, float]:
    """Return corpus BLEU and mean ROUGE-L, both from 0 to 100, against any number of references per output.

    BLEU is sacrebleu's with the 13a tokenizer; in lower case it equals the official E2E NLG scorer. ROUGE-L is the
    F-measure of the longest common subsequence (Lin 2004) with the reference it fits best; rouge_score always
    compares in lower case.

    Raises:
        DataError: There are no outputs, or one has no reference.
    """
    _check_pairs(outputs, references)
    for number, group in enumerate(references, start=1):
        if not group:
            raise DataError(f"Output {number} has no reference to be scored against.")
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise ConfigurationError(MISSING.format(error=error)) from None
    most = max(map(len, references))
    # sacrebleu takes references by column; None fills the rows that have fewer.
    columns = [[r[i] if i < len(r) else None for r in references] for i in range(most)]
    bleu = BLEU(lowercase=lowercase).corpus_score(list(outputs), columns)  # type: ignore[arg-type]
    rouge = RougeScorer(["rougeL"])
    best = [
        max(rouge.score(reference, output)["rougeL"].fmeasure for reference in group)
        for output, group in zip(outputs, references, strict=True)
    ]
    return {"bleu": bleu.score, "rouge_l": 100 * sum(best) / len(best)}


def classification_scores(
    predictions: Sequence[int], labels: Sequence[int], *, classes: int
) -> dict[str, float]:
    """Return accuracy, F1 and the Matthews correlation, each as a fraction.

    F1 is that of class 1 where there are two classes (as GLUE's MRPC and QQP), else the mean over classes. Labels
    and predictions that are all one class correlate with nothing: their Matthews correlation is given as 0.
    """
    _check_pairs(predictions, labels)
    try:
        from sklearn import metrics
    except ImportError as error:
        raise ConfigurationError(MISSING.format(error=error)) from None
    varied = len({*labels, *predictions}) > 1
    average = "binary" if classes == 2 else "macro"
    every = None if classes == 2 else list(range(classes))
    return {
        "accuracy": float(metrics.accuracy_score(labels, predictions)),
        "f1": float(
            metrics.f1_score(labels, predictions, average=average, labels=every, zero_division=0)  # type: ignore[arg-type]
        ),
        "matthews": float(metrics.matthews_corrcoef(labels, predictions)) if varied else 0.0,
    }


def regression_scores(predictions: Sequence[float], labels: Sequence[float]) -> dict[str, float]:
    """Return Pearson's and Spearman's correlation and the mean squared error.

    Predictions (or labels) that are all the same correlate with nothing: their correlation is given as 0.
    """
    _check_pairs(predictions, labels)
    try:
        from scipy import stats
    except ImportError as error:
        raise ConfigurationError(MISSING.format(error=error)) from None
    squares = [(p - y) ** 2 for p, y in zip(predictions, labels, strict=True)]
    return {
        "pearson": _correlation(stats.pearsonr, predictions, labels),
        "spearman": _correlation(stats.spearmanr, predictions, labels),
        "mse": sum(squares) / len(squares),
    }


def _correlation(
    measure: Callable[..., Any], predictions: Sequence[float], labels: Sequence[float]
) -> float:
    varied = len(set(predictions)) > 1 and len(set(labels)) > 1
    return float(measure(predictions, labels).statistic) if varied else 0.0


def _check_pairs(outputs: Sequence, references: Sequence) -> None:
    if not outputs:
        raise DataError("There is nothing to score: the list of outputs is empty.")
    if len(outputs) != len(references):
        raise DataError(
            f"{len(outputs)} outputs cannot be scored against {len(references)} references."
        )
