"""Scores of recorded sums, and intervals over the choice of the scored examples."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import bootstrap

from lorakit.metrics import e2e
from lorakit.metrics.labels import classification
from lorakit.paper.resampling import (
    ACCURACY,
    E2E_BLEU,
    MATTHEWS,
    as_lines,
    interval_over_examples,
    of_lines,
)
from lorakit.paper.studies import STUDIES

WORDS = ["the", "a", "cafe", "near", "river", "serves", "food", "."]


def _classes(right: float, seed: int = 0, count: int = 300) -> list[dict[str, int]]:
    """Return records of an evaluation in which about this share of the classes is right."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, count)
    hits = generator.random(count) < right
    return [
        {"output": int(a if hit else 1 - a), "label": int(a)}
        for a, hit in zip(labels, hits, strict=True)
    ]


def _texts(errors: float, count: int = 100) -> list[dict]:
    """Return records in which about this share of the words differs from the first of two references."""
    generator = np.random.default_rng(0)
    records = []
    for _ in range(count):
        words = [*generator.choice(WORDS, size=generator.integers(1, 14))]
        output = [
            generator.choice(WORDS) if generator.random() < errors else word for word in words
        ]
        other = " ".join(generator.choice(WORDS, size=6))
        records.append({"output": " ".join(output), "references": [" ".join(words), other]})
    return records


@pytest.mark.parametrize(
    ("name", "sums", "right"),
    [("accuracy", ACCURACY, 0.7), ("matthews", MATTHEWS, 0.7), ("matthews", MATTHEWS, 0.2)],
)
def test_sums_of_classes_give_the_score(name, sums, right):
    records = _classes(right)
    expected = classification([r["output"] for r in records], [r["label"] for r in records])
    summands = sums.of(records)
    assert summands.shape == (len(records), sums.size)
    assert sums.score(summands.sum(0)) == pytest.approx(expected[name], rel=1e-12)


def test_matthews_is_zero_where_a_class_is_missing():
    summands = MATTHEWS.of([{"output": 1, "label": 1}, {"output": 1, "label": 0}])
    assert MATTHEWS.score(summands.sum(0)) == 0


@pytest.mark.parametrize("errors", [0.05, 0.4])
def test_sums_of_texts_give_the_official_bleu(errors):
    records = [*_texts(errors), {"output": "", "references": ["a cafe"]}]
    outputs, references = [r["output"] for r in records], [r["references"] for r in records]
    summands = of_lines(as_lines(E2E_BLEU.of(records)))
    assert summands.shape == (len(records), E2E_BLEU.size)
    expected = e2e(outputs, references, java=False)["BLEU"]
    assert E2E_BLEU.score(summands.sum(0)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("sums", "ours", "theirs"),
    [
        (ACCURACY, _classes(0.8), _classes(0.7, seed=1)),
        (MATTHEWS, _classes(0.8), _classes(0.75, seed=1)),
        (E2E_BLEU, _texts(0.1), _texts(0.15)),
    ],
)
def test_the_interval_is_scipys_percentile_bootstrap(sums, ours, theirs):
    ours, theirs = sums.of(ours), sums.of(theirs)

    def difference(rows):
        return sums.score(ours[rows].sum(0)) - sums.score(theirs[rows].sum(0))

    rows = np.arange(len(ours))
    expected = bootstrap(
        (rows,), difference, vectorized=False, n_resamples=5_000, method="percentile", rng=1
    ).confidence_interval
    low, high = interval_over_examples([(ours, theirs)], sums.score)
    # Two sets of 5,000 draws: an end scatters by some 2 % of the width.
    tolerance = 0.08 * (expected.high - expected.low)
    assert low == pytest.approx(expected.low, abs=tolerance)
    assert high == pytest.approx(expected.high, abs=tolerance)


def test_all_runs_of_a_draw_are_scored_on_the_same_examples():
    """Equal runs never differ, and a common example cancels."""
    summands = ACCURACY.of(_classes(0.7))
    assert interval_over_examples([(summands, summands)] * 2, ACCURACY.score) == (0.0, 0.0)


def test_several_seeds_have_the_interval_of_their_mean():
    """The errors of two seeds are independent here, so their mean scatters less than each."""
    seeds = ((0, 1), (2, 3))
    pairs = [(ACCURACY.of(_classes(0.8, a)), ACCURACY.of(_classes(0.7, b))) for a, b in seeds]
    widths = [
        high - low
        for low, high in (
            interval_over_examples(chosen, ACCURACY.score) for chosen in (pairs[:1], pairs)
        )
    ]
    assert widths[1] == pytest.approx(widths[0] / 2**0.5, rel=0.15)


@pytest.mark.parametrize("line", ["", "1 x", "1  2", "1.5", "9" * 30, "1 2 3"])
def test_damaged_lines_are_refused(line):
    with pytest.raises(ValueError, match=r"integers|inhomogeneous|shape"):
        of_lines(["1 2", line])


def test_the_commonest_class_of_each_task(shared: Path):
    few_examples = STUDIES["table16"].data_sets
    assert all(data_set.commonest for data_set in few_examples)
    for data_set in (*STUDIES["table2"].data_sets, few_examples[0]):
        if data_set.commonest is None:
            continue
        path = shared / "data" / data_set.task / f"{data_set.scored or 'validation'}.jsonl"
        labels = Counter(json.loads(line)["label"] for line in path.read_text().splitlines())
        share = 100 * labels.most_common(1)[0][1] / labels.total()
        assert round(share, 1) == data_set.commonest, data_set.key
