"""Direction of each score."""

from __future__ import annotations

import pytest

from lorakit.evaluation.score import DIRECTIONS, is_better
from lorakit.tasks import task_type

LESS = {"loss", "perplexity", "mse"}
MORE = {"bleu", "rouge_l", "accuracy", "f1", "matthews", "pearson", "spearman"}


@pytest.mark.parametrize("name", DIRECTIONS)
def test_every_score_has_its_direction_and_nan_is_never_better(name: str) -> None:
    assert name in LESS | MORE
    assert is_better(name, 1.0, 2.0) == (name in LESS)
    assert is_better(name, 2.0, 1.0) == (name in MORE)
    assert not is_better(name, 2.0, 2.0)
    assert is_better(name, 1.0, None)
    assert not is_better(name, float("nan"), None)


@pytest.mark.parametrize(("score", "less"), [("TER", True), ("BLEU", False), ("TER seen", True)])
def test_a_task_names_its_scores_of_which_less_is_better(score: str, less: bool) -> None:
    names = task_type("webnlg").less_is_better
    assert is_better(score, 1.0, 2.0, less_is_better=names) == less
    assert is_better(score, 2.0, 1.0, less_is_better=names) != less
