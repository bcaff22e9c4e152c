"""Scores as functions of sums over the scored examples, and how a difference depends on the choice of the examples.

Other examples would give other scores. The paired bootstrap (Koehn 2004) estimates how far: it draws as many of the
scored examples as there are, with replacement, and scores both methods on each draw.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorakit.metrics.mteval import bleu_counts, bleu_of_sums

RESAMPLES = 5_000
"""Draws of an interval: its ends then vary by some 2 % of its width from seed to seed of the draws."""
_CHUNK = 4_000_000
"""Numbers in memory at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExampleSums:
    """How a score follows from sums over the scored examples."""

    of: Callable[[Sequence[Mapping[str, Any]]], np.ndarray]
    """Maps the records of an evaluation to what each example adds, shape (examples, sums)."""
    size: int
    """Number of sums."""
    score: Callable[[np.ndarray], np.ndarray]
    """Maps sums of shape (..., sums) to scores of shape (...), in the evaluation's unit."""


def as_lines(summands: np.ndarray) -> list[str]:
    """Return integers of shape (examples, sums) as one line of text per sum."""
    return [" ".join(map(str, line)) for line in summands.T.tolist()]


def of_lines(lines: Sequence[str]) -> np.ndarray:
    """Return the integers in lines of `as_lines`.

    Raises:
        ValueError: The lines are not of this form, or have other numbers of integers.
    """
    if not all(re.fullmatch(r"-?\d{1,9}( -?\d{1,9})*", line) for line in lines):
        raise ValueError("a line is not a list of integers")
    return np.array([[int(number) for number in line.split()] for line in lines]).T


def interval_over_examples(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]], score: Callable[[np.ndarray], np.ndarray]
) -> tuple[float, float]:
    """Return the 95 % interval of the mean difference of pairs of runs over the choice of the scored examples.

    The ends are quantiles of the differences on resampled examples (the percentile bootstrap). Every run of a draw is
    scored on the same examples. Examples that add the same to all runs are drawn as one, with their number as weight:
    accuracy has a few such kinds, whatever the number of examples.

    Args:
        pairs: For each pair of runs, what each example adds to the sums of both; all of shape (examples, sums).
        score: Maps sums to scores, as `ExampleSums.score`.
    """
    runs = [run for pair in pairs for run in pair]
    kinds, counts = np.unique(np.hstack(runs), axis=0, return_counts=True)
    ends = np.cumsum([run.shape[1] for run in runs])[:-1]
    count = len(runs[0])
    generator = np.random.default_rng(0)
    found: list[np.ndarray] = []
    draws = max(1, _CHUNK // len(kinds))
    for start in range(0, RESAMPLES, draws):
        times = generator.multinomial(count, counts / count, size=min(draws, RESAMPLES - start))
        scores = [score(sums) for sums in np.split(times @ kinds, ends, axis=1)]
        found.append(np.mean(np.subtract(scores[::2], scores[1::2]), axis=0))
    low, high = np.quantile(np.concatenate(found), (0.025, 0.975))
    return float(low), float(high)


def _right(records: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Return whether each predicted class is right, and 1."""
    return np.array([[record["output"] == record["label"], 1] for record in records], dtype=int)


def _confusion(records: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Return a 1 in one of four columns: true positives, true negatives, false positives, false negatives."""
    pairs = [(bool(record["output"]), record["output"] == record["label"]) for record in records]
    cells = ((True, True), (False, True), (True, False), (False, False))
    return np.array([[pair == cell for cell in cells] for pair in pairs], dtype=int)


def _matthews(sums: np.ndarray) -> np.ndarray:
    """Return Matthews' correlation of two classes; 0 where one is missing, as in scikit-learn."""
    tp, tn, fp, fn = np.moveaxis(sums.astype(float), -1, 0)
    product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / np.sqrt(np.where(product > 0, product, np.inf))


ACCURACY = ExampleSums(of=_right, size=2, score=lambda sums: sums[..., 0] / sums[..., 1])
MATTHEWS = ExampleSums(of=_confusion, size=4, score=_matthews)
E2E_BLEU = ExampleSums(
    of=lambda records: bleu_counts(
        [record["output"] for record in records], [record["references"] for record in records]
    ),
    size=9,
    score=bleu_of_sums,
)
