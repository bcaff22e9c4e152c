"""Translation edit rate against pyter3, which the official scorer calls."""

from __future__ import annotations

import pyter
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.metrics.edit_rate import edit_rate

words = st.lists(st.sampled_from("abcde"), max_size=9)


@pytest.mark.slow
@given(words, words.filter(bool))
@settings(max_examples=300)
def test_equals_pyter(output: list[str], reference: list[str]) -> None:
    assert edit_rate(output, [reference]) == pyter.ter(output, reference)


def test_the_example_of_the_paper() -> None:
    reference = "SAUDI ARABIA denied THIS WEEK information published in the AMERICAN new york times"
    output = "THIS WEEK THE SAUDIS denied information published in the new york times"
    # Snover et al. 2006: one shift, two substitutions, one insertion.
    assert edit_rate(output.split(), [reference.split()]) == pytest.approx(4 / 13)


def test_the_least_of_several_references() -> None:
    assert edit_rate(["a", "b"], [["x", "y", "z"], ["a", "b"]]) == 0


def test_texts_without_words() -> None:
    assert edit_rate([], [["a", "b"]]) == 1
    assert edit_rate(["a"], [[]]) == 1
    assert edit_rate([], [[]]) == 1


def test_may_exceed_one() -> None:
    assert edit_rate(["x", "y", "z"], [["a"]]) == 3
