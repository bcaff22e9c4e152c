"""The tables of the training benchmark, from its figures."""

from __future__ import annotations

from statistics import median
from typing import Any

from rich.table import Table

from benchmarks import report
from benchmarks.limit import settled
from benchmarks.workloads import WORKLOADS

Row = dict[str, Any]
"""The figures of a row, as `training.measure` returns them."""


def speed(run: dict[str, Any]) -> float:
    """Tokens per second, each example's in full, over the counted updates of a run."""
    return sum(run["tokens"]) / sum(run["seconds"])


def sections(record: dict[str, Row]) -> list[report.Section]:
    """Return the tables of each row, in the order of the workloads: its systems, and PEFT's settings."""
    made = []
    for row in (record[workload.name] for workload in WORKLOADS if workload.name in record):
        made.append(report.Section(row["title"], comparison(row), note(row)))
        made.append(report.Section(f"PEFT's settings: {row['title']}", sweep(row)))
    return made


def comparison(row: Row) -> Table:
    """The systems of a row beside PEFT's default, its best, and the limit."""
    made = report.table(
        "system",
        "tokens/s",
        "range",
        "x PEFT's default",
        "x PEFT's best",
        "share of the limit",
        "peak memory, MB",
        "loading, MB",
        "held-out loss",
        "trained",
    )
    machine = fastest(row)
    for name in row["systems"]:
        runs = row["runs"][name]
        speeds = [speed(run) for run in runs]
        label = name + (" (default)" if name == row["default"] else "")
        label += " (best)" if name == row["best"] else ""
        made.add_row(
            label,
            f"{median(speeds):,.0f}",
            f"{min(speeds):,.0f} to {max(speeds):,.0f}",
            f"{times_as_fast(row, name, row['default']):.2f}",
            f"{times_as_fast(row, name, row['best']):.2f}",
            # The limit is that of thin matrices: to train the weights takes half as many products again.
            "" if name.startswith("full") else f"{median(speeds) / machine:.0%}",
            f"{median(run['memory'] for run in runs) / 1e6:,.0f}",
            f"{median(run['loading_memory'] for run in runs) / 1e6:,.0f}",
            f"{runs[0]['held_out']:.4f}",
            f"{runs[0]['trained']:,}",
        )
    made.add_row(f"limit, {row['limit']['dtype']}", f"{machine:,.0f}", *[""] * 8)
    return made


def times_as_fast(row: Row, name: str, other: str) -> float:
    """How many times as fast a system is as another: the median of the ratios within each round."""
    pairs = zip(row["runs"][name], row["runs"][other], strict=True)
    return median(speed(run) / speed(beside) for run, beside in pairs)


def rates(row: Row) -> list[float]:
    """The samples of the machine's rate, one before each run of the row."""
    return [run["rate"] for runs in row["runs"].values() for run in runs]


def fastest(row: Row) -> float:
    """Tokens per second of a training that does nothing but the products it needs, at the machine's rate."""
    return sum(row["limit"]["tokens"]) * settled(rates(row)) / sum(row["limit"]["operations"])


def note(row: Row) -> str:
    """What a reader has to know beside a row's table."""
    found = [rate / 1e9 for rate in rates(row)]
    sentences = [
        f"Data: {row['source']}. The limit is at {settled(found):,.0f} GFLOP/s, the median of the faster half of "
        f"{len(found)} samples ({min(found):,.0f} to {max(found):,.0f}), one before each run."
    ]
    rounds = len(row["runs"][row["systems"][0]])
    sentences.append(f"Medians of {rounds} runs." if rounds > 1 else "One run each.")
    if row["left_out"]:
        sentences.append(f"Not run here, for time: {', '.join(dict.fromkeys(row['left_out']))}.")
    if row["machine"] != report.machine():
        sentences.append(f"Measured on {report.in_words(row['machine'])}")
    return " ".join(sentences)


def sweep(row: Row) -> Table:
    """PEFT's settings, one run each."""
    made = report.table("setting", "tokens/s", "peak memory, MB", "held-out loss")
    for name in row["sweep"]:
        run = row["runs"][name][0]
        made.add_row(
            name, f"{speed(run):,.0f}", f"{run['memory'] / 1e6:,.0f}", f"{run['held_out']:.4f}"
        )
    return made
