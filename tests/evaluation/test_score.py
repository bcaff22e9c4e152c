"""Direction of each score."""

from __future__ import annotations

from lorakit.evaluation.score import DIRECTIONS, is_better


def test_better_is_less_loss_or_more_of_the_others_and_never_nan() -> None:
    assert is_better("loss", 1.0, 2.0)
    assert not is_better("loss", 2.0, 2.0)
    assert is_better("accuracy", 0.9, 0.8)
    assert is_better("f1", 0.1, None)
    for name in DIRECTIONS:
        assert not is_better(name, float("nan"), None)
