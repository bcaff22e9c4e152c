"""Direction of each score."""

from __future__ import annotations

import pytest

from lorakit.evaluation.score import DIRECTIONS, directions_of, is_better
from lorakit.tasks import task_type

LESS = {"loss", "perplexity", "mse"}
MORE = {"bleu", "rouge_l", "accuracy", "f1", "matthews", "pearson", "spearman"}


@pytest.mark.parametrize("name", DIRECTIONS)
def test_every_score_has_its_direction_and_nan_is_never_better(name: str) -> None:
    assert name in LESS | MORE
    direction = DIRECTIONS[name]
    assert is_better(1.0, 2.0, direction) == (name in LESS)
    assert is_better(2.0, 1.0, direction) == (name in MORE)
    assert not is_better(2.0, 2.0, direction)
    assert is_better(1.0, None, direction)
    assert not is_better(float("nan"), None, direction)


def test_a_task_names_its_scores_of_which_less_is_better() -> None:
    directions = directions_of(task_type("webnlg"))
    own = {"TER": "min", "BLEU": "max", "TER seen": "min", "METEOR unseen": "max"}
    assert directions.items() >= {**DIRECTIONS, **own}.items()
    assert "accuracy mismatched" not in directions
    assert directions_of(task_type("mnli"))["accuracy mismatched"] == "max"
