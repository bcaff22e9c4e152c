"""The tables of the training benchmark."""

from __future__ import annotations

from statistics import median
from typing import Any

from rich.table import Table

from benchmarks import report
from benchmarks.limit import settled
from benchmarks.workloads import WORKLOADS

Row = dict[str, Any]
"""The results of a row, as `training.measure` returns them."""


def speed(run: dict[str, Any]) -> float:
    """Return the tokens per second over the counted updates of a run, without padding."""
    return sum(run["tokens"]) / sum(run["seconds"])


def sections(record: dict[str, Row]) -> list[report.Section]:
    """Return the tables of each row, in the order of the workloads: its systems, and PEFT's settings."""
    tables = []
    for row in (record[workload.name] for workload in WORKLOADS if workload.name in record):
        tables.append(report.Section(row["title"], comparison(row), note(row)))
        tables.append(report.Section(f"PEFT's settings: {row['title']}", sweep(row)))
    return tables


def comparison(row: Row) -> Table:
    """Return a table of the systems of a row against PEFT's default, PEFT's best, and the limit."""
    table = report.table(
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
        table.add_row(
            label,
            f"{median(speeds):,.0f}",
            f"{min(speeds):,.0f} to {max(speeds):,.0f}",
            f"{times_as_fast(row, name, row['default']):.2f}",
            f"{times_as_fast(row, name, row['best']):.2f}",
            # The limit applies to LoRA only: full fine-tuning needs half as many products again.
            "" if name.startswith("full") else f"{median(speeds) / machine:.0%}",
            f"{median(run['memory'] for run in runs) / 1e6:,.0f}",
            f"{median(run['loading_memory'] for run in runs) / 1e6:,.0f}",
            f"{runs[0]['held_out']:.4f}",
            f"{runs[0]['trained']:,}",
        )
    table.add_row(f"limit, {row['limit']['dtype']}", f"{machine:,.0f}", *[""] * 8)
    return table


def times_as_fast(row: Row, name: str, other: str) -> float:
    """Return the speed ratio of two systems: the median of the ratios within each round."""
    pairs = zip(row["runs"][name], row["runs"][other], strict=True)
    return median(speed(run) / speed(other_run) for run, other_run in pairs)


def rates(row: Row) -> list[float]:
    """Return the samples of the machine's matmul rate, one before each run of the row."""
    return [run["rate"] for runs in row["runs"].values() for run in runs]


def fastest(row: Row) -> float:
    """Return the tokens per second at the limit: only the needed products, at the machine's rate."""
    return sum(row["limit"]["tokens"]) * settled(rates(row)) / sum(row["limit"]["operations"])


def note(row: Row) -> str:
    """Return the note below the table of a row."""
    gflops = [rate / 1e9 for rate in rates(row)]
    sentences = [
        f"Data: {row['source']}. The limit assumes {settled(gflops):,.0f} GFLOP/s, the median of the faster half of "
        f"{len(gflops)} samples ({min(gflops):,.0f} to {max(gflops):,.0f}), one before each run."
    ]
    rounds = len(row["runs"][row["systems"][0]])
    sentences.append(f"Medians of {rounds} runs." if rounds > 1 else "One run each.")
    if row["left_out"]:
        systems = ", ".join(dict.fromkeys(row["left_out"]))
        sentences.append(f"Not run here, to save time: {systems}.")
    if row["machine"] != report.machine():
        sentences.append(f"Measured on {report.in_words(row['machine'])}")
    return " ".join(sentences)


def sweep(row: Row) -> Table:
    """Return a table of PEFT's settings, one run each."""
    table = report.table("setting", "tokens/s", "peak memory, MB", "held-out loss")
    for name in row["sweep"]:
        run = row["runs"][name][0]
        table.add_row(
            name, f"{speed(run):,.0f}", f"{run['memory'] / 1e6:,.0f}", f"{run['held_out']:.4f}"
        )
    return table
