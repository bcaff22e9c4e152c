from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from lorakit.errors import ConfigurationError, DataError
from lorakit.evaluation import score
from lorakit.evaluation.score import (
    DIRECTIONS,
    classification_scores,
    is_better,
    regression_scores,
    text_scores,
)


def test_bleu_equals_the_official_e2e_scorer(shared: Path) -> None:
    folder = shared / "metrics" / "e2e_golden"
    outputs = (folder / "outputs.txt").read_text(encoding="utf-8").splitlines()
    groups = (folder / "references.txt").read_text(encoding="utf-8").strip().split("\n\n")
    golden = json.loads((folder / "scores.json").read_text())
    scores = text_scores(outputs, [group.splitlines() for group in groups])
    assert round(scores["bleu"] / 100, 4) == golden["BLEU"]
    # The official ROUGE-L weighs recall by 1.2 and takes precision and recall from different references.
    assert scores["rouge_l"] / 100 == pytest.approx(golden["ROUGE_L"], abs=0.005)


def test_outputs_may_have_different_numbers_of_references() -> None:
    outputs = ["the cat sat on the mat", "a dog ran home today"]
    references = [["the cat sat on the mat", "a cat sat there"], ["a dog ran home today"]]
    assert text_scores(outputs, references) == {
        "bleu": pytest.approx(100),
        "rouge_l": pytest.approx(100),
    }


def test_case_matters_when_asked() -> None:
    outputs, references = ["The Cat sat on the mat"], [["the cat sat on the mat"]]
    assert text_scores(outputs, references)["bleu"] == pytest.approx(100)
    assert text_scores(outputs, references, lowercase=False)["bleu"] < 80


def test_rouge_l_takes_the_best_reference() -> None:
    # Longest common subsequence "a b c": precision 3/3, recall 3/4.
    scores = text_scores(["a b c"], [["x y z", "a q b c"]])
    assert scores["rouge_l"] == pytest.approx(100 * 2 * 1 * 0.75 / 1.75)


def test_classification_scores_by_hand() -> None:
    # true positives 2, false positives 1, false negatives 1, true negatives 2
    scores = classification_scores([1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0], classes=2)
    assert scores["accuracy"] == pytest.approx(4 / 6)
    assert scores["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert scores["matthews"] == pytest.approx((2 * 2 - 1 * 1) / math.sqrt(3 * 3 * 3 * 3))


def test_f1_of_several_classes_counts_one_that_never_occurs() -> None:
    scores = classification_scores([0, 1, 1], [0, 1, 1], classes=3)
    assert scores["f1"] == pytest.approx(2 / 3)
    assert scores["accuracy"] == 1


def test_a_set_of_one_class_has_scores_too() -> None:
    assert classification_scores([1, 1], [1, 1], classes=2) == {
        "accuracy": 1.0,
        "f1": 1.0,
        "matthews": 0.0,
    }


def test_regression_scores_by_hand() -> None:
    scores = regression_scores([1.0, 2.0, 4.0], [1.0, 3.0, 5.0])
    assert scores["spearman"] == pytest.approx(1.0)
    assert scores["pearson"] == pytest.approx(6 / math.sqrt((14 / 3) * 8))
    assert scores["mse"] == pytest.approx(2 / 3)


def test_constant_predictions_correlate_with_nothing() -> None:
    scores = regression_scores([2.0, 2.0], [1.0, 3.0])
    assert scores["pearson"] == scores["spearman"] == 0.0


def test_better_is_less_loss_or_more_of_the_others_and_never_nan() -> None:
    assert is_better("loss", 1.0, 2.0)
    assert not is_better("loss", 2.0, 2.0)
    assert is_better("accuracy", 0.9, 0.8)
    assert is_better("f1", 0.1, None)
    for name in DIRECTIONS:
        assert not is_better(name, float("nan"), None)


@pytest.mark.parametrize(
    ("outputs", "references", "message"),
    [
        ([], [], "nothing to score"),
        (["a"], [["b"], ["c"]], "1 outputs cannot be scored against 2"),
        (["a", "b"], [["a"], []], "Output 2 has no reference"),
    ],
)
def test_what_cannot_be_scored_says_why(outputs, references, message: str) -> None:
    with pytest.raises(DataError, match=message):
        text_scores(outputs, references)


def test_a_missing_scorer_names_the_extra(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu.metrics.bleu", None)
    with pytest.raises(ConfigurationError, match=r"lorakit\[train\]"):
        score.text_scores(["a"], [["a"]])
