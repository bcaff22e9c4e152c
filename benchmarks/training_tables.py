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
    """Return the tables of each row, in the order of the workloads: its systems, and PEFT's and TRL's settings."""
    tables = []
    for row in (record[workload.name] for workload in WORKLOADS if workload.name in record):
        tables.append(report.Section(row["title"], comparison(row), note(row)))
        tables.append(report.Section(f"PEFT's settings: {row['title']}", sweep(row, row["sweep"])))
        if row["trl_sweep"]:
            settings = sweep(row, row["trl_sweep"])
            tables.append(report.Section(f"TRL's settings: {row['title']}", settings))
    return tables


def comparison(row: Row) -> Table:
    """Return a table of the systems of a row against PEFT in float32, the best of PEFT and TRL, and both limits."""
    table = report.table(
        "system",
        "tokens/s",
        "range",
        "x PEFT in float32",
        "x PEFT's best",
        *["x TRL's best"] * len(row["trl_best"]),
        "share of the limit",
        "peak memory, MB",
        "loading, MB",
        "held-out loss",
        "trained",
    )
    bounds = limits(row)
    lowest = min(bounds.values())
    for name in row["systems"]:
        runs = row["runs"][name]
        speeds = [speed(run) for run in runs]
        label = name + (" (best)" if name in [row["best"], *row["trl_best"]] else "")
        table.add_row(
            label,
            f"{median(speeds):,.0f}",
            f"{min(speeds):,.0f} to {max(speeds):,.0f}",
            *(
                compared(row, name, peer)
                for peer in (row["default"], row["best"], *row["trl_best"])
            ),
            # The limit applies to LoRA only: full fine-tuning needs half as many products again.
            "" if name.startswith("full") else f"{median(speeds) / lowest:.0%}",
            f"{median(run['memory'] for run in runs) / 1e6:,.0f}",
            f"{median(run['loading_memory'] for run in runs) / 1e6:,.0f}",
            f"{runs[0]['held_out']:.4f}",
            f"{runs[0]['trained']:,}",
        )
    for name, bound in bounds.items():
        label = f"limit, {name}" + (" (binds)" if bound == lowest else "")
        table.add_row(label, f"{bound:,.0f}", *[""] * (len(table.columns) - 2))
    return table


def compared(row: Row, name: str, other: str) -> str:
    """Return the speed ratio of two systems, and its range over the rounds."""
    found = ratios(row, name, other)
    text, lowest, highest = (f"{value:.2f}" for value in (median(found), min(found), max(found)))
    return text if lowest == highest else f"{text} ({lowest} to {highest})"


def times_as_fast(row: Row, name: str, other: str) -> float:
    """Return the speed ratio of two systems: the median of the ratios within each round that ran both."""
    return median(ratios(row, name, other))


def ratios(row: Row, name: str, other: str) -> list[float]:
    """Return the speed ratio of two systems within each round that ran both."""
    pairs = zip(row["runs"][name], row["runs"][other], strict=False)
    return [speed(run) / speed(other_run) for run, other_run in pairs]


def samples(row: Row, name: str) -> list[float]:
    """Return the samples of the machine's matmul `rate` or `bandwidth`, one before each run of the row."""
    return [run[name] for runs in row["runs"].values() for run in runs]


def limits(row: Row) -> dict[str, float]:
    """Return the tokens per second at which the machine computes the products, and moves the bytes, of the row."""
    limit = row["limit"]
    tokens = sum(limit["tokens"])
    rate, bandwidth = (settled(samples(row, name)) for name in ("rate", "bandwidth"))
    return {
        f"products ({limit['dtype']})": tokens * rate / sum(limit["operations"]),
        "memory": tokens * bandwidth / sum(limit["bytes"]),
    }


def note(row: Row) -> str:
    """Return the note below the table of a row."""
    gflops = [rate / 1e9 for rate in samples(row, "rate")]
    gigabytes = [bandwidth / 1e9 for bandwidth in samples(row, "bandwidth")]
    sentences = [
        f"Data: {row['source']}. The limits assume {_settled(gflops, 'GFLOP/s')} and {_settled(gigabytes, 'GB/s')}: "
        f"the median of the faster half of {len(gflops)} samples, one before each run."
    ]
    runs = {name: len(row["runs"][name]) for name in row["systems"]}
    rounds = max(runs.values())
    sentences.append(f"Medians of {rounds} runs." if rounds > 1 else "One run each.")
    fewer = [name for name, count in runs.items() if count < rounds]
    if fewer:
        sentences.append(f"Only in the first round: {'; '.join(fewer)}.")
    if row["left_out"]:
        systems = ", ".join(dict.fromkeys(row["left_out"]))
        sentences.append(f"Not run here, to save time: {systems}.")
    if row["machine"] != report.machine():
        sentences.append(f"Measured on {report.in_words(row['machine'])}")
    return " ".join(sentences)


def _settled(rates: list[float], unit: str) -> str:
    return f"{settled(rates):,.0f} {unit} ({min(rates):,.0f} to {max(rates):,.0f})"


def sweep(row: Row, settings: list[str]) -> Table:
    """Return a table of the settings of a peer, one run each."""
    table = report.table("setting", "tokens/s", "peak memory, MB", "held-out loss")
    for name in settings:
        run = row["runs"][name][0]
        table.add_row(
            name, f"{speed(run):,.0f}", f"{run['memory'] / 1e6:,.0f}", f"{run['held_out']:.4f}"
        )
    return table
