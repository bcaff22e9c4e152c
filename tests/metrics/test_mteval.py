"""BLEU and NIST of the E2E scorer against the formulas, sacrebleu and the official scores."""

from __future__ import annotations

import math

import pytest

from lorakit.metrics import bleu
from lorakit.metrics.mteval import bleu_and_nist


def test_golden_scores_to_four_decimals(golden) -> None:
    bleu4, nist = bleu_and_nist(golden.outputs, golden.references)
    assert round(bleu4, 4) == golden.scores["BLEU"]
    assert round(nist, 4) == golden.scores["NIST"]


def test_bleu_is_sacrebleus_where_outputs_have_four_tokens(golden) -> None:
    ours, _ = bleu_and_nist(golden.outputs, golden.references)
    # Equal counts, but another order of floating-point operations.
    assert ours == pytest.approx(bleu(golden.outputs, golden.references) / 100, rel=1e-12)


def test_scores_of_equal_texts() -> None:
    texts = ["The cat sat on the mat .", "A dog ran home ."]
    bleu4, nist = bleu_and_nist(texts, [[text] for text in texts])
    assert bleu4 == pytest.approx(1)
    # 12 words: "." twice, "the" twice, eight others once. A word that occurs once determines the next word; "the" has
    # two possible successors; longer contexts determine the next word.
    unigrams = (8 * math.log2(12) + 4 * math.log2(12 / 2)) / 12
    assert nist == pytest.approx(unigrams + 2 * math.log2(2) / 10)


def test_case_and_the_best_of_several_references() -> None:
    bleu4, _ = bleu_and_nist(["THE cat sat here"], [["a dog ran far away", "the Cat sat here"]])
    assert bleu4 == pytest.approx(1)


def test_of_two_equally_close_references_the_shorter_counts() -> None:
    # 5 tokens against 4 and 6: no brevity penalty, although no reference contains "e".
    bleu4, _ = bleu_and_nist(["a b c d e"], [["a b c d", "u v w x y z"]])
    assert bleu4 == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4))


def test_short_outputs_count_as_in_the_official_scorer() -> None:
    # "b" adds 1 unigram, 0 bigrams, -1 trigrams and -2 4-grams: totals 6, 4, 2, 0. 6 unigrams, 4 bigrams, 3 trigrams
    # and 2 4-grams match.
    bleu4, _ = bleu_and_nist(["a b c d e", "b"], [["a b c d e"], ["b"]])
    assert bleu4 == pytest.approx((6 / 6 * 4 / 4 * 3 / 2 * 2 / 1e-9) ** (1 / 4))


def test_an_empty_output_is_a_word_that_matches_nothing() -> None:
    bleu4, nist = bleu_and_nist([""], [["a b"]])
    one_of_none = 1e-15 / 1e-9
    assert bleu4 == pytest.approx(math.exp(1 - 2) * (1e-15 * one_of_none**3) ** (1 / 4))
    assert nist == 0


def test_nist_halves_at_two_thirds_of_the_length() -> None:
    # The mean length of the references is 6, that of the output 4. Each of its words is one of 6 + 6.
    _, nist = bleu_and_nist(["a b c d"], [["a b c d e f", "u v w x y z"]])
    assert nist == pytest.approx(math.log2(12) / 2)
