"""Sizes, durations, counts and shares as text."""

from __future__ import annotations

import pytest

from lorakit.formatting import (
    duration,
    gigabytes,
    percentage,
    rounded_count,
    short_duration,
    size,
)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        *[(0, "0 bytes"), (999, "999 bytes"), (999.6, "1 kB"), (1_844_000, "1.84 MB")],
        *[(999_600_000, "1 GB"), (39.46e9, "39.5 GB"), (1.2e12, "1.2 TB"), (2.5e15, "2.5 PB")],
    ],
)
def test_bytes_in_the_unit_that_fits(count: float, text: str) -> None:
    assert size(count) == text


def test_durations() -> None:
    assert [duration(t) for t in (44.6, 723, 7_500)] == ["45s", "12m 03s", "2h 05m"]


def test_short_durations() -> None:
    assert [short_duration(t) for t in (0.0853, 4.21, 7_500)] == ["85 ms", "4.2 s", "2h 05m"]


def test_bytes_in_gigabytes() -> None:
    assert gigabytes(1_234_000_000) == "1.23 GB"


def test_counts_in_words() -> None:
    counts = (999, 460_800, 135e6, 1.2358e9)
    texts = ["999", "460.8 thousand", "135 million", "1.236 billion"]
    assert [rounded_count(count) for count in counts] == texts


def test_percentages() -> None:
    assert [percentage(part, 1000) for part in (3.42, 123.4, 1000)] == [
        "0.34 %",
        "12.3 %",
        "100.0 %",
    ]
