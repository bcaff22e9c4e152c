"""Quantities as a person reads them."""

from __future__ import annotations

import pytest

from lorakit.training.progress import duration, size


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
