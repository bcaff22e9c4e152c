"""Metrics of classification and regression by scikit-learn and scipy, and the metrics of each GLUE task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lorakit.errors import DataError, nearest
from lorakit.metrics.checks import check_classes, check_numbers, check_pairs, requires_extra

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
"""Metrics of each GLUE task (Wang et al. 2018, table 1)."""


def glue(task: str, predictions: Sequence[float], labels: Sequence[float]) -> dict[str, float]:
    """Return the metrics of a GLUE task as fractions. The paper prints them times 100.

    Args:
        task: Name of the task, a key of `GLUE`. MNLI has two development sets, matched and mismatched. For both
            concatenated, the accuracy is that of all rows.
        predictions: Class indices; scores for stsb.
        labels: Correct class indices or scores, in the same order.

    Raises:
        DataError: The task is unknown, or predictions or labels are invalid.
        ConfigurationError: scikit-learn or scipy is not installed.
    """
    if task not in GLUE:
        raise DataError(
            f"GLUE has no task '{task}'.{nearest(str(task), GLUE)} Its tasks are {', '.join(GLUE)}."
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

    - accuracy: the fraction of correct predictions.
    - f1: 2 TP / (2 TP + FP + FN) of class 1 for two classes (as in GLUE's MRPC and QQP), else the mean over the classes
      that occur in the labels or the predictions, as scikit-learn's macro average.
    - matthews: (TP TN - FP FN) / sqrt((TP + FP)(TP + FN)(TN + FP)(TN + FN)); for more than two classes the
      generalisation of Gorodkin 2004. It is 0 if all predictions or all labels are one class.

    Args:
        predictions: Class indices from 0.
        labels: Correct class indices, in the same order.
        classes: Number of classes. None means two if only 0 and 1 occur.

    Raises:
        DataError: The list of predictions is empty, its length differs from that of labels, or a value is not a class
            index.
        ConfigurationError: scikit-learn is not installed.
    """
    check_pairs(predictions, labels)
    check_classes("Prediction", predictions, classes)
    check_classes("Label", labels, classes)
    with requires_extra("train"):
        from sklearn import metrics
    occurring = {*labels, *predictions}
    binary = classes == 2 or (classes is None and occurring <= {0, 1})
    average = "binary" if binary else "macro"
    accuracy = metrics.accuracy_score(labels, predictions)
    f1 = metrics.f1_score(labels, predictions, average=average, zero_division=0)  # type: ignore[arg-type]
    # scikit-learn also returns 0 for a single class, but warns.
    matthews = metrics.matthews_corrcoef(labels, predictions) if len(occurring) > 1 else 0.0
    return {"accuracy": float(accuracy), "f1": float(f1), "matthews": float(matthews)}


def regression(predictions: Sequence[float], labels: Sequence[float]) -> dict[str, float]:
    """Return Pearson's and Spearman's correlation, from -1 to 1, and the mean squared error.

    Spearman's correlation is Pearson's correlation of the ranks. Both are 0 if all predictions or all labels are equal,
    as for a single pair.

    Raises:
        DataError: The list of predictions is empty, its length differs from that of labels, or a value is not a finite
            number.
        ConfigurationError: scipy is not installed.
    """
    check_pairs(predictions, labels)
    check_numbers("Prediction", predictions)
    check_numbers("Label", labels)
    with requires_extra("train"):
        from scipy import stats
    # NumPy's scalars would add in their own dtype: float16 stalls, and uint8 wraps.
    predictions, labels = [float(p) for p in predictions], [float(y) for y in labels]
    squares = [(p - y) * (p - y) for p, y in zip(predictions, labels, strict=True)]
    return {
        "pearson": _correlation(stats.pearsonr, predictions, labels),
        "spearman": _correlation(stats.spearmanr, predictions, labels),
        "mse": sum(squares) / len(squares),
    }


def _correlation(
    measure: Callable[..., Any], predictions: Sequence[float], labels: Sequence[float]
) -> float:
    defined = len(set(predictions)) > 1 and len(set(labels)) > 1
    return float(measure(predictions, labels).statistic) if defined else 0.0
