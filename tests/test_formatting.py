"""Sizes, durations, counts and shares as text."""

from __future__ import annotations

import pytest

from lorakit.formatting import (
    duration,
    number,
    number_range,
    percentage,
    rounded_count,
    shell_command,
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


@pytest.mark.parametrize(
    ("system", "line"),
    [
        ("linux", """lorakit train --config 'out\\a b.yaml' --lora.rank_pattern '{"q": 2}'"""),
        ("win32", r'''lorakit train --config "out\a b.yaml" --lora.rank_pattern "{\"q\": 2}"'''),
    ],
)
def test_a_command_is_quoted_for_the_shell(
    system: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.platform", system)
    words = ["lorakit", "train", "--config", r"out\a b.yaml", "--lora.rank_pattern", '{"q": 2}']
    assert shell_command(words) == line


def test_durations() -> None:
    assert [duration(t) for t in (44.6, 723, 7_500)] == ["45s", "12m 03s", "2h 05m"]


def test_short_durations() -> None:
    assert [short_duration(t) for t in (0.0853, 4.21, 7_500)] == ["85 ms", "4.2 s", "2h 05m"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *[(1_234_567, "1,234,567"), (-3, "-3"), (0.0, "0"), (0.5, "0.5000"), (-3.14159, "-3.142")],
        *[(9_999.96, "10,000"), (12_345.678, "12,346"), (1234.5, "1234"), (1e-6, "1e-06")],
        *[(0.00099996, "0.001000"), (2e20, "2e+20"), (float("nan"), "nan"), (float("inf"), "inf")],
    ],
)
def test_a_number_has_four_significant_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_the_sign_of_a_change() -> None:
    assert [number(x, sign=True) for x in (0.25, -0.25, 3)] == ["+0.2500", "-0.2500", "+3"]
    assert [percentage(x, sign=True) for x in (0.5, -0.5)] == ["+50.0 %", "-50.0 %"]


def test_the_ends_of_a_range_are_written_like_other_numbers() -> None:
    assert number_range([8, 1024, 2]) == "2 to 1,024"
    assert number_range([0.54321, 1.5]) == "0.5432 to 1.500"
    assert number_range([0.54321, 0.54324]) == "0.5432"


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
