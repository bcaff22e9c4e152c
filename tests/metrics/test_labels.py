"""Metrics of classification and regression against their formulas, and the metrics of each GLUE task."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import f1_score

from lorakit.errors import DataError
from lorakit.metrics import GLUE, classification, glue, regression


def test_classification_by_hand() -> None:
    # true positives 2, false positives 1, false negatives 1, true negatives 2
    assert classification([1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0], classes=2) == {
        "accuracy": pytest.approx(4 / 6),
        "f1": pytest.approx(2 * 2 / (2 * 2 + 1 + 1)),
        "matthews": pytest.approx((2 * 2 - 1 * 1) / math.sqrt(3 * 3 * 3 * 3)),
    }


def test_f1_of_several_classes_is_the_mean_over_those_that_occur() -> None:
    # Class 0: 2/3, class 1: 2/3, class 2: 1. A fourth class never occurs.
    predictions, labels = [0, 1, 1, 2], [0, 0, 1, 2]
    expected = pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert classification(predictions, labels)["f1"] == expected
    assert classification(predictions, labels, classes=4)["f1"] == expected
    assert f1_score(labels, predictions, average="macro") == expected
    # The model never predicts class 2, and no label is class 2.
    assert classification([0, 1, 0], [0, 1, 0], classes=3)["f1"] == 1
    assert classification([0, 1, 0], [0, 1, 1], classes=3)["f1"] == pytest.approx(2 / 3)
    # A class that is predicted or correct, and never both, scores 0.
    assert classification([0, 1, 2], [0, 1, 1], classes=4)["f1"] == pytest.approx((1 + 2 / 3) / 3)


def test_a_set_of_one_class_has_scores_too() -> None:
    scores = classification([1, 1], [1, 1], classes=2)
    assert scores == {"accuracy": 1, "f1": 1, "matthews": 0}


def test_a_class_index_may_be_large() -> None:
    assert classification([10**12, 0], [10**12, 0])["f1"] == 1


def test_regression_by_hand() -> None:
    assert regression([1.0, 2.0, 4.0], [1.0, 3.0, 5.0]) == {
        "pearson": pytest.approx(6 / math.sqrt((14 / 3) * 8)),
        "spearman": pytest.approx(1),
        "mse": pytest.approx(2 / 3),
    }


def test_spearman_gives_equal_values_their_mean_rank() -> None:
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5, variances 4.5 and 5.
    spearman = regression([1.0, 2.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0])["spearman"]
    assert spearman == pytest.approx(4.5 / math.sqrt(4.5 * 5))


@pytest.mark.parametrize(
    ("predictions", "labels"), [([1, 1], [0, 1]), ([0, 1], [1, 1]), ([1], [1])]
)
def test_constant_values_have_correlation_zero(predictions, labels) -> None:
    assert classification(predictions, labels, classes=2)["matthews"] == 0
    scores = regression(predictions, labels)
    assert scores["pearson"] == scores["spearman"] == 0


def test_arrays_are_lists_too() -> None:
    assert classification(np.array([1, 0]), np.array([1, 1]))["accuracy"] == 0.5  # type: ignore[arg-type]
    assert regression(np.array([1.5, 0]), np.array([1.5, 1]))["mse"] == 0.5  # type: ignore[arg-type]
    scores = regression(np.full(3000, 2, "float16"), np.array([1, 4] * 1500, "uint8"))  # type: ignore[arg-type]
    assert scores["mse"] == 2.5
    assert type(scores["mse"]) is float


def test_glue_returns_the_metrics_of_each_task() -> None:
    for task, names in GLUE.items():
        assert tuple(glue(task, [0, 1, 1, 0], [0, 1, 0, 0])) == names
    assert glue("mnli", [2, 1, 0], [2, 1, 1]) == {"accuracy": pytest.approx(2 / 3)}


@pytest.mark.parametrize(
    ("task", "predictions", "labels", "message"),
    [
        ("sst-2", [1], [1], "no task 'sst-2'. Did you mean 'sst2'"),
        ("cola", [2], [1], "Prediction 1 is 2, expected a class index from 0 to 1"),
        ("cola", [1], [-1], "Label 1 is -1"),
        ("cola", [0.5], [1], "Prediction 1 is 0.5"),
        ("cola", [True], [1], "Prediction 1 is True"),
        ("cola", ["1"], [1], "Prediction 1 is '1'"),
        ("cola", [1, 0], [1], "Found 2 outputs and 1 references"),
        ("cola", [], [], "list of outputs is empty"),
        ("stsb", [float("nan")], [1.0], "Prediction 1 is nan, expected a finite number"),
        ("stsb", [1.0, 2.0], [1.0, None], "Label 2 is None"),
    ],
)
def test_invalid_inputs_are_reported(task, predictions, labels, message: str) -> None:
    with pytest.raises(DataError, match=message):
        glue(task, predictions, labels)
