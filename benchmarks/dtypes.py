"""Training speed of lorakit in float32 and bfloat16, and the dtype that `base.dtype: auto` chooses.

The dtypes alternate, round after round, each run in its own process. Each run starts with a sample of the matmul rate
in its dtype and of the memory bandwidth. `auto` chooses from trial products (lorakit.models.dtype_choice), before any
training.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

from benchmarks import report
from benchmarks.limit import settled
from benchmarks.runs import runs_of
from benchmarks.training import Machine, System, chosen_dtype, prepare_once
from benchmarks.training_tables import speed, times_as_fast
from benchmarks.workloads import WORKLOADS

ROWS = ("e2e", "distinct", "mrpc")
DTYPES = ("float32", "bfloat16")
ROUNDS = 3
LOSS = 0.03
"""Largest acceptable loss of speed if `auto` misses the faster dtype."""


def main(*, quick: bool) -> None:
    """Train on every row in both dtypes, and write the table."""
    report.say("\ndtypes: training in float32 and bfloat16")
    record: dict[str, Any] = {"machine": report.machine(), "rows": {}}
    for workload in (w for w in WORKLOADS if w.name in ROWS):
        runs = runs_of("dtypes", workload.name, quick)
        updates = workload.quick_updates or 2 if quick else workload.updates
        prepared = prepare_once(workload, runs, updates)
        machines = {dtype: Machine(prepared, dtype) for dtype in DTYPES}
        figures: dict[str, list[dict[str, Any]]] = {}
        for number in range(1 if quick else ROUNDS):
            for dtype in DTYPES:
                system = System(dtype, "lorakit_train", (("dtype", dtype),))
                command = system.command(prepared.folder, held_out=False)
                run = runs.run(f"{number} {dtype}", *command, sample=machines[dtype].sample)
                figures.setdefault(dtype, []).append(run)
                report.say(f"  {workload.name}, {dtype:<9} {speed(run):>8,.0f} tokens/s")
        record["rows"][workload.name] = {
            "title": workload.title,
            "auto": chosen_dtype(prepared),
            "runs": figures,
        }
    report.publish("dtypes", record, sections(record), quick)


def sections(record: dict[str, Any]) -> Iterator[report.Section]:
    """Yield the table, and how far `auto` is from the faster dtype."""
    table = report.table(
        "training", "dtype", "products, GFLOP/s", "memory, GB/s", "tokens/s", "range", "x float32"
    )
    for row in record["rows"].values():
        for dtype, runs in row["runs"].items():
            speeds = [speed(run) for run in runs]
            table.add_row(
                row["title"],
                dtype + (" (auto)" if dtype == row["auto"] else ""),
                *(
                    f"{settled([r[name] for r in runs]) / 1e9:,.0f}"
                    for name in ("rate", "bandwidth")
                ),
                f"{median(speeds):,.0f}",
                f"{min(speeds):,.0f} to {max(speeds):,.0f}",
                f"{times_as_fast(row, dtype, DTYPES[0]):.2f}",
            )
    worst = min(of_the_faster(row) for row in record["rows"].values())
    within = "within" if worst >= 1 - LOSS else "not within"
    yield report.Section(
        "Training by dtype",
        table,
        f"`auto` reaches {worst:.0%} of the speed of the faster dtype or more, which is {within} {LOSS:.0%} of it. "
        "Ratios are medians of those within each round.",
    )


def of_the_faster(row: dict[str, Any]) -> float:
    """Return the speed of the dtype that `auto` chose, relative to the faster one."""
    return min(times_as_fast(row, row["auto"], dtype) for dtype in DTYPES)
