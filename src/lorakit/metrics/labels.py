"""Metrics of predicted classes and numbers, by scikit-learn and scipy, and which of them GLUE's tasks report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lorakit.errors import DataError, nearest
from lorakit.metrics.checks import check_classes, check_numbers, check_pairs, missing_package

GLUE: dict[str, tuple[str, ...]] = {
    "cola": ("matthews",),
    "mnli": ("accuracy",),
    "mrpc": ("accuracy", "f1"),
    "qnli": ("accuracy",),
    "qqp": ("accuracy", "f1"),
    "rte": ("accuracy",),
    "sst2": ("accuracy",),
    "stsb": ("pearson", "spearman"),
}
"""What each task of GLUE reports (Wang et al. 2018, table 1)."""


def glue(task: str, predictions: Sequence[float], labels: Sequence[float]) -> dict[str, float]:
    """Return the metrics of a GLUE task, as fractions; the paper prints them times 100.

    Args:
        task: Its name, a key of `GLUE`. MNLI has two development sets, matched and mismatched: of both together this
            is the overall accuracy, of either its own.
        predictions: Class indices; for stsb scores.
        labels: What is right, in the same order.

    Raises:
        DataError: The task is unknown, or predictions and labels cannot be scored.
        ConfigurationError: scikit-learn or scipy is not installed.
    """
    if task not in GLUE:
        raise DataError(
            f"GLUE has no task '{task}'.{nearest(str(task), GLUE)} Its tasks: {', '.join(GLUE)}."
        )
    if task == "stsb":
        scores = regression(predictions, labels)
    else:
        scores = classification(predictions, labels, classes=3 if task == "mnli" else 2)  # type: ignore[arg-type]
    return {name: scores[name] for name in GLUE[task]}


def classification(
    predictions: Sequence[int], labels: Sequence[int], *, classes: int | None = None
) -> dict[str, float]:
    """Return accuracy and F1, from 0 to 1, and the Matthews correlation, from -1 to 1.

    - accuracy: the share of predictions that are right.
    - f1: 2 TP / (2 TP + FP + FN) of class 1 where there are two classes (as GLUE's MRPC and QQP), else its mean over
      all classes; 0 for a class that neither stands in the labels nor is predicted.
    - matthews: (TP TN - FP FN) / sqrt((TP + FP)(TP + FN)(TN + FP)(TN + FN)), and for more classes its generalisation
      by Gorodkin 2004. Predictions (or labels) that are all one class correlate with nothing: 0.

    Args:
        predictions: Class indices, from 0.
        labels: What is right, in the same order.
        classes: How many there are; None: those that occur, and two where none but 0 and 1 does.

    Raises:
        DataError: There are no predictions, not as many as labels, or they are not class indices.
        ConfigurationError: scikit-learn is not installed.
    """
    check_pairs(predictions, labels)
    check_classes("Prediction", predictions, classes)
    check_classes("Label", labels, classes)
    try:
        from sklearn import metrics
    except ImportError as error:
        raise missing_package(error, "train") from None
    found = {*labels, *predictions}
    binary = classes == 2 or (classes is None and found <= {0, 1})
    every = None if binary or classes is None else list(range(classes))
    return {
        "accuracy": float(metrics.accuracy_score(labels, predictions)),
        "f1": float(
            metrics.f1_score(
                labels,
                predictions,
                average="binary" if binary else "macro",
                labels=every,
                zero_division=0,  # type: ignore[arg-type]
            )
        ),
        # scikit-learn gives 0 for a set of one class too, but warns.
        "matthews": float(metrics.matthews_corrcoef(labels, predictions))
        if len(found) > 1
        else 0.0,
    }


def regression(predictions: Sequence[float], labels: Sequence[float]) -> dict[str, float]:
    """Return Pearson's and Spearman's correlation, from -1 to 1, and the mean squared error.

    Spearman's is Pearson's of the ranks. Predictions (or labels) that are all the same, and a single pair, correlate
    with nothing: their correlation is given as 0.

    Raises:
        DataError: There are no predictions, not as many as labels, or they are not finite numbers.
        ConfigurationError: scipy is not installed.
    """
    check_pairs(predictions, labels)
    check_numbers("Prediction", predictions)
    check_numbers("Label", labels)
    try:
        from scipy import stats
    except ImportError as error:
        raise missing_package(error, "train") from None
    squares = [(p - y) * (p - y) for p, y in zip(predictions, labels, strict=True)]
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
