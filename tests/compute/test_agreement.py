"""The comparison of the predictions of two models, on logits whose differences can be read off."""

from __future__ import annotations

from torch import tensor

from lorakit.compute.agreement import Agreement, agreement


def test_tokens() -> None:
    before = [tensor([[1.0, 2.0, 0.0], [5.0, -7.0, 0.0]]), tensor([[0.0, 0.0, 3.0]])]
    after = [tensor([[2.5, 2.0, 0.0], [4.5, -7.0, 9.0]]), tensor([[0.0, 1.0, 3.0]])]
    expected = Agreement(predicts="token", predictions=3, changed=2, difference=9, scale=7)
    assert agreement(before, after) == expected


def test_labels() -> None:
    before = [tensor([0.5, -1.5]), tensor([1.0, 2.0]), tensor([4.0, 3.0])]
    after = [tensor([0.5, -1.25]), tensor([1.0, 0.5]), tensor([4.0, 3.0])]
    expected = Agreement(predicts="label", predictions=3, changed=1, difference=1.5, scale=4)
    assert agreement(before, after) == expected


def test_a_score_has_no_most_likely_label() -> None:
    before, after = [tensor([0.5]), tensor([-3.0])], [tensor([-0.25]), tensor([-2.0])]
    expected = Agreement(predicts="score", predictions=2, changed=0, difference=1, scale=3)
    assert agreement(before, after) == expected
