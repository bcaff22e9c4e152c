"""Tables of the benchmarks from given results."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import benchmarks
from benchmarks import (
    accuracy,
    adapter,
    dtypes,
    inference,
    merge_drift,
    profile,
    report,
    table1,
    training,
    training_tables,
)
from benchmarks.__main__ import COMMANDS, PARTS
from benchmarks.workloads import WORKLOADS


def cells(text: str, first: str) -> list[str]:
    """Return the cells of the only line of a Markdown table that starts with `first`."""
    lines = [line for line in text.splitlines() if re.match(rf"\| {re.escape(first)}\s*\|", line)]
    assert len(lines) == 1, text
    return [cell.strip() for cell in lines[0].strip("|").split("|")]


def test_the_overview_names_every_part() -> None:
    named = set(re.findall(r"^(\w+)\.py ", benchmarks.__doc__ or "", re.M))
    assert named >= {module.split(".")[1] for module in (PARTS | COMMANDS).values()}


def run(seconds: float, rate: float = 1e9, **figures: Any) -> dict[str, Any]:
    return {
        "tokens": [60, 40],
        "seconds": [seconds / 2, seconds / 2],
        "rate": rate,
        "bandwidth": 2e10,
        "memory": 2e9,
        "loading_memory": 1e9,
        "held_out": 1.25,
        "trained": 1234,
        **figures,
    }


@pytest.fixture
def row() -> dict[str, Any]:
    """Return a row with three rounds. In the second, the machine is half as fast and its samples are slow."""
    return {
        "title": "A row",
        "source": "E2E NLG",
        "machine": report.machine(),
        "default": "PEFT, float32, plain",
        "best": "PEFT, bf16 weights, bucketed",
        "trl_best": ["TRL, bf16 weights, bucketed"],
        "sweep": ["PEFT, float32, plain", "PEFT, bf16 weights, bucketed"],
        "trl_sweep": ["TRL, defaults", "TRL, bf16 weights, bucketed"],
        "systems": [
            "lorakit",
            "PEFT, float32, plain",
            "PEFT, bf16 weights, bucketed",
            "TRL, defaults",
            "TRL, bf16 weights, bucketed",
        ],
        "left_out": ["loralib", "full fine-tuning", "full fine-tuning"],
        "limit": {
            "dtype": "bfloat16",
            "tokens": [60, 40],
            "operations": [3e8, 2e8],
            "bytes": [3e9, 1e9],
            "counts": [],
        },
        "runs": {
            "lorakit": [run(1.0), run(2.0, rate=1e7), run(1.25)],
            "PEFT, float32, plain": [run(4.0), run(8.0, rate=1e7), run(5.0)],
            "PEFT, bf16 weights, bucketed": [run(2.0), run(4.0, rate=1e7), run(2.5)],
            "TRL, defaults": [run(5.0)],
            "TRL, bf16 weights, bucketed": [run(2.5), run(5.0, rate=1e7), run(2.5)],
        },
    }


def test_a_training_row(row: dict[str, Any]) -> None:
    text = report.markdown(training_tables.sections({"e2e": row}))
    # 100 tokens need 500 million operations. At a billion operations per second the limit is 200 tokens/s.
    of_lorakit = ["lorakit", "80", "50 to 100", "4.00", "2.00", "2.50 (2.00 to 2.50)", "40%"]
    assert cells(text, "lorakit") == [*of_lorakit, "2,000", "1,000", "1.2500", "1,234"]
    assert cells(text, "limit, products (bfloat16) (binds)")[1] == "200"
    # 100 tokens need 4 GB, at 20 GB/s.
    assert cells(text, "limit, memory")[1] == "500"
    compared, _ = text.split("### PEFT's settings")
    assert cells(compared, "PEFT, float32, plain")[3:6] == ["1.00", "0.50", "0.62 (0.50 to 0.62)"]
    assert cells(text, "PEFT, bf16 weights, bucketed (best)")[3:6] == [
        "2.00",
        "1.00",
        "1.25 (1.00 to 1.25)",
    ]
    assert cells(text, "TRL, bf16 weights, bucketed (best)")[3:6] == [
        "1.60 (1.60 to 2.00)",
        "0.80 (0.80 to 1.00)",
        "1.00",
    ]
    # One run, compared with the others of its round.
    compared, _, settings = text.partition("### PEFT's settings: A row")
    assert cells(compared, "TRL, defaults")[1:5] == ["20", "20 to 20", "0.80", "0.40"]
    assert cells(settings.partition("### TRL's settings: A row")[2], "TRL, defaults")[1] == "20"
    assert "Not run here, to save time: loralib, full fine-tuning." in text
    assert "Medians of 3 runs. Only in the first round: TRL, defaults." in text
    assert (
        "The limits assume 1 GFLOP/s (0 to 1) and 20 GB/s (20 to 20): the median of the faster"
        in text
    )
    assert "half of 13 samples" in text


def test_the_slower_limit_binds(row: dict[str, Any]) -> None:
    row["limit"]["bytes"] = [2e10, 0]
    text = report.markdown(training_tables.sections({"e2e": row}))
    assert cells(text, "limit, products (bfloat16)")[1] == "200"
    assert cells(text, "limit, memory (binds)")[1] == "100"
    assert cells(text, "lorakit")[6] == "80%"


def test_a_classifier_has_no_row_of_trl(row: dict[str, Any]) -> None:
    row |= {"trl_best": [], "trl_sweep": [], "systems": row["systems"][:3]}
    assert "TRL" not in report.markdown(training_tables.sections({"mrpc": row}))


def test_a_row_of_another_day_says_so(row: dict[str, Any]) -> None:
    row["machine"]["date"] = "1999-12-31"
    assert "Measured on 1999-12-31" in training_tables.note(row)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", ["e2e", "e2e-grouped", "mrpc"])
def test_the_rounds_of_a_row(name: str, quick: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first round runs every setting. Later rounds repeat PEFT in float32 and what may be PEFT's and TRL's best."""
    workload = next(w for w in WORKLOADS if w.name == name)
    ran: list[str] = []

    class Runs:
        def run(self, key: str, *command: str, sample: Any) -> dict[str, Any]:
            ran.append(key)
            seconds = 2.1 if "bf16 weights" in key else 5.0
            if (
                "weights and autocast" in key
            ):  # the fastest, but for a slow moment in the first round
                seconds = 2.2 if key.startswith("0") else 2.0
            return run(seconds, **sample()) | {"process_seconds": 9.0}

    def machine(prepared: object) -> SimpleNamespace:
        limit = {"dtype": "float32", "tokens": [1], "operations": [1], "bytes": [1], "counts": []}
        return SimpleNamespace(sample=lambda: {"rate": 1.0, "bandwidth": 1.0}, limit=lambda: limit)

    monkeypatch.setattr(training, "Machine", machine)
    prepared = SimpleNamespace(workload=workload, source="E2E", updates=2, folder=Path())
    row = training.measure(prepared, Runs(), quick=quick)
    assert training_tables.sections({name: row})
    counts = {system: len(runs) for system, runs in row["runs"].items()}
    rounds = 1 if quick else training.ROUNDS
    assert sum(counts.values()) == len(ran) == len(set(ran))
    expected = {"lorakit", row["default"]} | {
        s for s in counts if s.startswith(("loralib", "full")) or "bf16 weights" in s
    }
    assert counts == {system: rounds if system in expected else 1 for system in counts}
    has_trl = workload.task == "completion"
    assert ("TRL, defaults" in row["systems"]) == has_trl
    fastest = "bf16 weights" if quick else "bf16 weights and autocast"
    assert row["best"].startswith(f"PEFT, {fastest}, ")
    assert [best.startswith("TRL, bf16 weights") for best in row["trl_best"]] == [True] * has_trl


def test_sections_become_headings_tables_and_notes() -> None:
    made = report.table("system", "tokens/s")
    made.add_row("ours", "12")
    text = report.markdown(
        [report.Section("A [title]", made, "A note."), report.Section("Another", made)]
    )
    blocks = text.rstrip("\n").split("\n\n")
    assert blocks[0] == f"*{report.in_words(report.machine())}*"
    assert [blocks[1], blocks[3], blocks[4]] == ["### A [title]", "A note.", "### Another"]
    heading, rule, line = blocks[2].splitlines()
    assert re.fullmatch(r"\| system \| tokens/s \|", heading)
    assert re.fullmatch(r"\|-+\|-+:?\|", rule)
    assert re.fullmatch(r"\| ours +\| +12 \|", line)


def test_inference_tables() -> None:
    times = {
        inference.BASE: [0.1, 0.2, 0.1, 0.1],
        "lorakit merged, all linear layers": [0.1, 0.2, 0.1, 0.1],
        "lorakit unmerged, q and v": [0.11, 0.22, 0.11, 0.11],
    }
    trace = {name: ["aten::mm"] for name in times} | {
        "lorakit unmerged, q and v": ["aten::mm", "aten::addmm_"]
    }
    process = {
        "prefill": times,
        "decode": times,
        "operations": {kind: inference.compare_to_base(trace) for kind in ("prefill", "decode")},
    }
    record = {"base": "tiny", "bfloat16": [process, process]}
    sections = list(inference.sections(record))
    assert len(sections) == 3
    text = report.markdown(sections[1:2])
    assert cells(text, inference.BASE)[1:3] == ["100.0", "1"]
    unmerged = cells(text, "lorakit unmerged, q and v")
    assert unmerged[1:] == ["110.0", "1.100 (1.100 to 1.100)", "1.100 to 1.100", "1.10"]
    few = report.markdown(list(inference.sections({**record, "bfloat16": [process]}))[1:2])
    assert cells(few, "lorakit unmerged, q and v")[2:4] == ["1.100", ""]
    operations = report.markdown(sections[2:])
    assert cells(operations, "lorakit merged, all linear layers")[1:] == ["1", "1", "yes"]
    assert cells(operations, "lorakit unmerged, q and v")[1:] == ["2", "2", "no"]


def test_table_1_with_the_paper_beside() -> None:
    process = {
        table1.BASE: [1.0, 2.0],
        table1.MERGED: [1.0, 2.0],
        "AdapterL": [1.5, 3.0],
        "AdapterH": [2.0, 4.0],
    }
    text = report.markdown(
        [report.Section("Table 1", table1.latencies({s.name: [process] for s in table1.SETTINGS}))]
    )
    assert cells(text, table1.BASE)[1] == "1,500.0"
    assert cells(text, table1.MERGED)[1:3] == ["1,500.0 (+0.0 %; +0.0 to +0.0)", ""]
    assert cells(text, "AdapterL")[1:3] == ["2,250.0 (+50.0 %; +50.0 to +50.0)", "+2.2 %"]
    assert cells(text, "AdapterH")[6] == "+30.3 %"


def test_adapter_and_merge_tables() -> None:
    steps = [{"attach": 0.01 * i, "save": 0.02, "load": 0.03} for i in (1, 9, 2)]
    text = report.markdown([report.Section("", adapter.durations({"lorakit": steps}))])
    assert cells(text, "lorakit")[1:] == ["20 (10 to 90)", "20 (20 to 20)", "30 (30 to 30)"]
    runs = [{"changed": 1234, "largest": 0.5, "exact": None, "seconds": 0.002}]
    text = report.markdown([report.Section("", merge_drift.drift({"bfloat16": {"PEFT": runs}}))])
    assert cells(text, "bfloat16, PEFT")[1:] == ["1,234", "0.5", "-", "2.00"]


def test_the_interval_of_a_difference_is_paired() -> None:
    """Both are wrong on the same hundred examples, so only the one example that differs adds variance."""
    ours = np.arange(1000) >= 100
    theirs = ours.copy()
    theirs[500] = False
    low, high = accuracy.interval(ours, theirs)
    assert 0 <= low <= 0.001 <= high <= 0.005
    assert accuracy.interval(ours, ours) == (0.0, 0.0)


def test_accuracies_beside_each_other() -> None:
    """PEFT is wrong on half of the examples with one seed, and on none with the other seed."""

    def found(loss: float, right: bool) -> dict[str, object]:
        return {"loss": loss, "right": [True, right] * 50}

    ours, theirs = accuracy.OURS.name, accuracy.PEFT.name
    seeds = {
        "0": {ours: found(0.5, True), theirs: found(0.6, False)},
        "1": {ours: found(0.4, True), theirs: found(0.4, True)},
    }
    record = {"source": "MRPC", "updates": 12, "epochs": 3, "seeds": seeds}
    text = report.markdown(accuracy.sections(record))
    assert cells(text, "0") == ["0", "0.5000", "0.6000", "100.00%", "50.00%"]
    assert cells(text, "mean") == ["mean", "0.4500", "0.5000", "100.00%", "75.00%"]
    # Student's t with one degree of freedom: 25 ± 12.706 x 25.
    assert "over 2 seeds: +25.00 points, 95% interval -292.66 to +342.66 over the seeds" in text
    assert "loss -10.0%" in text


@pytest.mark.parametrize(
    ("name", "shapes", "expected"),
    [
        ("aten::mm", [[64, 576], [576, 576]], profile.LINEAR),
        ("aten::mm", [[64, 576], [576, 8]], profile.LOW_RANK),
        ("aten::mm", [[64, 576], [576, 49152]], profile.HEAD),
        ("aten::sub_", [[16, 49152], [16, 1]], profile.LOSS),
        ("aten::bmm", [[9, 64, 64], [9, 64, 64]], profile.ATTENTION),
        ("aten::_softmax", [[9, 64, 64], [], []], profile.SOFTMAX),
        ("aten::copy_", [[64, 576], [64, 576], []], profile.COPIES),
        ("aten::mul", [[64, 576], []], profile.REST),
    ],
)
def test_the_profile_tells_operations_apart_by_name_and_shapes(name, shapes, expected):
    assert profile.kind(name, shapes, vocabulary=49152, rank=8) == expected


def test_the_profile_is_a_table_of_shares():
    rows = {"e2e": {"title": "E2E", "seconds": {profile.LINEAR: 3.0, profile.REST: 1.0}}}
    text = report.markdown(list(profile.sections({"rows": rows})))
    assert cells(text, profile.LINEAR)[1] == "75%"
    assert cells(text, "total seconds")[1] == "4.0"


def test_the_dtypes_and_the_choice_of_auto() -> None:
    """The second workload is faster in float32, by 5 %, but `auto` chose bfloat16."""
    runs = {"float32": [run(2.0), run(4.0)], "bfloat16": [run(1.0, rate=3e9), run(2.0)]}
    record = {"rows": {"e2e": {"title": "E2E", "auto": "bfloat16", "runs": runs}}}
    text = report.markdown(dtypes.sections(record))
    assert text.count("| E2E ") == 2
    assert re.search(r"bfloat16 \(auto\) \| +3 \| +20 \| +75 \| +50 to 100 \| +2.00 \|", text)
    assert (
        "`auto` reaches 100% of the speed of the faster dtype or more, which is within 3%" in text
    )
    slow = {"float32": [run(1.0)], "bfloat16": [run(1.05)]}
    record["rows"]["mrpc"] = {"title": "MRPC", "auto": "bfloat16", "runs": slow}
    text = report.markdown(dtypes.sections(record))
    assert (
        "`auto` reaches 95% of the speed of the faster dtype or more, which is not within 3%"
        in text
    )
