"""ROUGE-L and CIDEr of COCO's scorers, against their formulas."""

from __future__ import annotations

import math

import pytest

from lorakit.metrics.captions import cider, rouge_l


def test_rouge_l_takes_the_best_precision_and_the_best_recall() -> None:
    # "a b c": 3/3 and 3/6 of the first reference, 2/3 and 2/2 of the second.
    precision, recall, b2 = 1.0, 1.0, 1.2**2
    expected = (1 + b2) * precision * recall / (recall + b2 * precision)
    assert rouge_l(["a b c"], [["a x b y c z", "b c"]]) == pytest.approx(expected)
    # the single reference: 2/3 and 2/4
    precision, recall = 2 / 3, 2 / 4
    expected = (1 + b2) * precision * recall / (recall + b2 * precision)
    assert rouge_l(["a b c"], [["a x y b"]]) == pytest.approx(expected)


def test_cider_of_equal_texts_and_of_one_too_long() -> None:
    references = [["a b c d e"], ["f g h i j"]]
    assert cider(["a b c d e", "f g h i j"], references) == pytest.approx(10)
    # One extra word, absent from all references, weighs log 2 like the others. The last of the 6-n+1 n-grams is wrong.
    cosines = [(6 - n) / math.sqrt((7 - n) * (6 - n)) for n in (1, 2, 3, 4)]
    longer = 10 * sum(cosines) / 4 * math.exp(-1 / (2 * 6**2))
    assert cider(["a b c d e x", "f g h i j"], references) == pytest.approx((longer + 10) / 2)


@pytest.mark.parametrize(
    ("outputs", "references"),
    [(["a b"], [["a b"]]), (["a"], [[""]]), (["", ""], [["a"], ["a"]])],
    ids=["one output", "no word in the references", "references that agree"],
)
def test_cider_is_zero_where_nothing_is_informative(outputs, references) -> None:
    assert cider(outputs, references) == 0
