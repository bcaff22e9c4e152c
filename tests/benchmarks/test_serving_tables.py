"""Tables of the serving benchmark and of the soak test, from given results."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
from test_benchmark_tables import cells

from benchmarks import report, serving, serving_steps, soak
from benchmarks.serving_load import Answer, Request


def trial(adapters: int, share: float | None, rate: float, **changes: Any) -> dict[str, Any]:
    found = {"p50": 0.1, "p95": 0.2, "p99": 1.5}
    return {
        "adapters": adapters,
        "share": share,
        "tokens_per_second": rate,
        "requests_per_second": rate / 40,
        "requests": 20,
        "chosen": max(1, min(adapters, 20)),
        "first_token": found,
        "between_tokens": found,
        "errors": {},
        "lost": 0,
        "short": 0,
        **changes,
    }


@pytest.fixture
def record() -> dict[str, Any]:
    systems = [
        {
            "name": "ours",
            "process_seconds": 9.0,
            "trials": [
                trial(0, None, 200),
                trial(64, None, 180, errors={"x": 2}, short=1),
                trial(64, 0.5, 90),
                {"adapters": 256, "share": None, "skipped": "too many"},
            ],
        },
        {
            "name": "theirs",
            "process_seconds": 9.0,
            "trials": [trial(64, None, 60), trial(64, 0.5, 30, lost=3)],
        },
        {"name": "absent", "skipped": "npm is not installed", "trials": []},
    ]
    rows = [
        serving_steps.ratio_row("ours / theirs", [9.0, 10.0, 11.0], [10.0] * 3, "at least 0.9"),
        serving_steps.ratio_row("ours / once", [10.0], [4.0]),
        serving_steps.row("load", 41.26, "ms"),
        serving_steps.row("errors", 0.0, target="0"),
    ]
    return {
        "base": "b",
        "dtype": "bfloat16",
        "capacity": 5.0,
        "size": {"patience": 30.0},
        "systems": systems,
        "measures": {"throughput": rows},
    }


def test_tables_of_systems(record: dict[str, Any]) -> None:
    text = report.markdown(list(serving.sections(record)))
    throughput, latency = text.split("### ")[1:3]
    assert cells(throughput, "system") == ["system", "base alone", "64 adapters, 20 used"]
    assert cells(throughput, "ours") == ["ours", "200 (5.0)", "180 (4.5), 2 errors, 1 short"]
    assert cells(throughput, "theirs") == ["theirs", "", "60 (1.5)"]
    assert cells(latency, "ours") == [
        "ours",
        "64",
        "50%",
        "100 / 200 / 1,500",
        "100 / 200 / 1,500",
        "0",
        "0 of 20",
    ]
    assert cells(latency, "theirs")[-1] == "3 of 20"
    assert "absent: npm is not installed." in text


def test_table_of_small_measures(record: dict[str, Any]) -> None:
    text = report.markdown(list(serving_steps.sections(record["measures"])))
    assert cells(text, "ours / once") == ["ours / once", "2.50 x", "", ""]
    assert cells(text, "ours / theirs") == [
        "ours / theirs",
        "1.00 x",
        "0.90 to 1.10",
        "at least 0.9",
    ]
    assert cells(text, "load")[1] == "41.3 ms"
    assert cells(text, "errors")[1:] == ["0", "", "0"]


def test_cases_of_all_systems_fit() -> None:
    for entry in serving.ENTRIES:
        assert entry.quick
        assert all(case.adapters in (*serving.ADAPTERS, serving.MANY) for case in entry.cases)
    keys = [entry.key for entry in serving.ENTRIES]
    assert len(set(keys)) == len(keys)
    own = next(e for e in serving.ENTRIES if e.module == serving.REFERENCE)
    assert {c.adapters for c in own.cases if c.share is None} == {0, 1, 8, 64, 256}


def test_times_of_a_batch() -> None:
    def answer(times: list[float]) -> Answer:
        given = Answer(Request((1,), None, 3), 10.0)
        given.times, given.ended = times, times[-1]
        return given

    # The second prompt is computed while the first answer decodes: its first gap is not a plain step.
    found = serving_steps.batch_times([answer([11, 13, 14, 15]), answer([13, 14, 15])], 10.0)
    assert found == (3.0, 1.0)
    failed = answer([11.0])
    failed.error = "Broken"
    with pytest.raises(RuntimeError, match="Broken"):
        serving_steps.batch_times([failed], 10.0)


def test_failed_trials_give_no_rate() -> None:
    with pytest.raises(RuntimeError, match="1 short answers"):
        serving_steps._rates([trial(0, None, 9, short=1)])
    with pytest.raises(RuntimeError, match="Broken"):
        serving_steps._rates([trial(0, None, 9, errors={"Broken": 1})])


def test_table_of_a_soak() -> None:
    options = vars(soak.arguments(["--minutes", "2", "--fault", "prefix"]))
    record = {
        "options": options,
        "bound": 0.002,
        "memory": [(0.0, 1_000_000_000), (61.0, 1_200_000_000), (120.0, 1_250_000_000)],
        "verification": {"verified_total": 5.0},
        "checked": 100,
        "tokens": 1000,
        "greedy": 600,
        "worst": 0.00012,
        "unreadable": 1,
        "wrong": 3,
        "reasons": {"log-probability off": 3},
        "lost": 0,
        "disconnected": 4,
        "changes": {"reload": 2},
        "expected": {"malformed (400)": 7},
        "unexpected": {},
    }
    text = report.markdown(soak.sections(record))
    assert "with the fault 'prefix'" in text
    assert cells(text, "wrong answers")[1] == "3"
    assert cells(text, "- log-probability off")[1] == "3"
    assert cells(text, "expected errors")[1] == "7"
    assert cells(text, "resident memory after a minute, at the end")[1] == "1,200, 1,250 MB"
    assert isinstance(soak.arguments([]), argparse.Namespace)


def test_counters_of_the_servers_own_verification() -> None:
    lines = [
        "# HELP lorakit_verified_total x",
        'lorakit_verified_total{adapter="a",result="failed"} 5.0',
        'lorakit_verified_total{adapter="b",result="failed"} 1.0',
        'lorakit_verified_total{adapter="b",result="passed"} 2.0',
        "lorakit_other 1.0",
        'lorakit_verified_bucket{le="1"} 3.0',
        'lorakit_verify_failed_total{adapter="a"} 2.0',
    ]
    assert soak.verification_metrics("\n".join(lines)) == {
        'lorakit_verified_total{result="failed"}': 6.0,
        'lorakit_verified_total{result="passed"}': 2.0,
        "lorakit_verify_failed_total": 2.0,
    }
