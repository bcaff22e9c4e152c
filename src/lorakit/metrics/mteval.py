"""BLEU and NIST of the E2E NLG Challenge, equal to the Python port of mteval-v13a in tuetschek/e2e-metrics.

sacrebleu has no NIST, and its BLEU differs for outputs shorter than four tokens. nltk's NIST compares with a single
reference. This module therefore counts n-grams itself, with sacrebleu's 13a tokenizer, which equals mteval-v13a's.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from lorakit.metrics.checks import check_texts, requires_extra

Tokens = list[str]
NGrams = Counter[tuple[str, ...]]
Pairs = list[tuple[Tokens, list[Tokens]]]
"""Tokens of each output and of its references."""

TINY_COUNT, TINY_TOTAL = 1e-15, 1e-9
"""Minimum counts of the official BLEU, which keep the logarithm finite."""

NIST_BETA = math.log(0.5) / math.log(1.5) ** 2
"""Sets NIST's length penalty to 1/2 for outputs with 2/3 of the references' length."""


def bleu_and_nist(
    outputs: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float, float]:
    """Return BLEU-4, from 0 to 1, and NIST-5, from 0 up, of a lower-cased corpus.

    The matches of an n-gram are limited to its maximum count in any one reference.

    - BLEU = BP * exp(mean over n of log p_n), p_n = matches / n-grams in the outputs, BP = min(1, exp(1 - r/c)) for c
      tokens in the outputs and r in the closest references (of two equally close, the shorter).
    - NIST = penalty * sum over n = 1..5 of (information of the matches / n-grams in the outputs), where an n-gram's
      information is log2(count of its first n-1 tokens / its count) in all references (Doddington 2002), and
      penalty = exp(beta * log(min(1, c / mean length of the references))^2).

    As in the official scorer, an empty output counts as one token that matches nothing, and an output of fewer than n
    tokens lowers the number of n-grams.

    Raises:
        DataError: The list of outputs is empty, or an output has no reference.
        ConfigurationError: sacrebleu is not installed.
    """
    pairs = _tokenized(outputs, references)
    matches = _all_matches(pairs, 5)
    totals = [sum(len(output) - n + 1 for output, _ in pairs) for n in range(1, 6)]
    sums = _bleu_counts(pairs, matches[:4]).sum(0)
    return float(bleu_of_sums(sums)), _nist(pairs, matches, totals)


def bleu_counts(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Return what each output adds to the sums that BLEU is a function of, shape (outputs, 9).

    The columns are its matches of 1- to 4-grams, its 1- to 4-grams, and the tokens of its closest reference.

    Raises:
        DataError, ConfigurationError: As for `bleu_and_nist`.
    """
    pairs = _tokenized(outputs, references)
    return _bleu_counts(pairs, _all_matches(pairs, 4))


def bleu_of_sums(sums: np.ndarray) -> np.ndarray:
    """Return BLEU-4, from 0 to 1, of sums of `bleu_counts`; shape (..., 9) to (...)."""
    matches, totals, closest = sums[..., :4], sums[..., 4:8], sums[..., 8]
    logs = np.log(np.maximum(matches, TINY_COUNT) / np.maximum(totals, TINY_TOTAL))
    return np.exp(np.minimum(0.0, 1 - closest / totals[..., 0]) + logs.mean(-1))


def _tokenized(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> Pairs:
    check_texts(outputs, references)
    tokenize = _tokenizer()
    return [
        (tokenize(output), [tokenize(reference) for reference in group])
        for output, group in zip(outputs, references, strict=True)
    ]


def _bleu_counts(pairs: Pairs, matches: list[list[NGrams]]) -> np.ndarray:
    return np.array(
        [
            [
                *(ngrams[i].total() for ngrams in matches),
                *(len(output) - n + 1 for n in range(1, 5)),
                min((abs(len(reference) - len(output)), len(reference)) for reference in group)[1],
            ]
            for i, (output, group) in enumerate(pairs)
        ]
    )


def _nist(pairs: Pairs, matches: list[list[NGrams]], totals: list[int]) -> float:
    counts: NGrams = Counter()
    for _, group in pairs:
        for reference in group:
            counts[()] += len(reference)
            for n in range(1, 6):
                counts.update(_ngrams(n, reference))
    information = 0.0
    for ngrams_by_output, total in zip(matches, totals, strict=True):
        bits = sum(
            math.log2(counts[ngram[:-1]] / counts[ngram]) * count
            for ngrams in ngrams_by_output
            for ngram, count in ngrams.items()
        )
        information += bits / max(total, 1)  # no n-grams means no matches
    length = sum(sum(map(len, group)) / len(group) for _, group in pairs)
    return information * math.exp(NIST_BETA * math.log(min(1.0, totals[0] / length)) ** 2)


def _all_matches(pairs: Pairs, longest: int) -> list[list[NGrams]]:
    """Return the matches of all outputs, for each length of n-grams from 1."""
    return [[_matches(n, output, group) for output, group in pairs] for n in range(1, longest + 1)]


def _matches(n: int, output: Tokens, group: list[Tokens]) -> NGrams:
    """Return the matches of each n-gram of an output with its references."""
    maximum: NGrams = Counter()
    for reference in group:
        maximum |= _ngrams(n, reference)
    return _ngrams(n, output) & maximum


def _ngrams(n: int, tokens: Tokens) -> NGrams:
    return Counter(zip(*(tokens[i:] for i in range(n)), strict=False))


def _tokenizer():
    with requires_extra("metrics"):
        from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
    split = Tokenizer13a()
    return lambda text: split(text).lower().split() or [""]
