"""Training speed and start-up time with and without torch.compile.

The runs alternate, each in its own process. Timing starts after the warm-up updates, which compile everything
that the counted updates need. The time before is the start-up time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from statistics import median
from typing import Any

from benchmarks import report
from benchmarks.runs import runs_of
from benchmarks.training import System, prepare_once
from benchmarks.training_tables import speed
from benchmarks.workloads import WORKLOADS

ROWS = ("e2e", "mrpc")
ROUNDS = 2
SYSTEMS = (
    System("as it is", "lorakit_train"),
    System("compiled", "lorakit_train", (("compile", True),)),
)


def main(*, quick: bool) -> None:
    """Measure both variants, and write the table."""
    report.say("\ncompiled: training with and without torch.compile")
    record: dict[str, Any] = {"machine": report.machine(), "rows": {}}
    for workload in (w for w in WORKLOADS if w.name in ROWS):
        # Batch lengths differ, so several of the first updates compile again.
        workload = dataclasses.replace(workload, warmup=6, updates=6 if quick else 12)
        runs = runs_of("compiled", workload.name, quick)
        prepared = prepare_once(workload, runs, workload.updates)
        figures: dict[str, list[dict[str, Any]]] = {}
        for number in range(1 if quick else ROUNDS):
            for system in SYSTEMS:
                command = system.command(prepared.folder, held_out=False)
                run = runs.run(f"{number} {system.name}", *command)
                figures.setdefault(system.name, []).append(run)
                report.say(
                    f"  {workload.name}, {system.name:<9} {speed(run):>8,.0f} tokens/s "
                    f"{run['process_seconds']:>6.0f} s"
                )
        record["rows"][workload.name] = {"title": workload.title, "runs": figures}
    report.publish("compiled", record, sections(record), quick)


def sections(record: dict[str, Any]) -> Iterator[report.Section]:
    """Yield the table."""
    table = report.table("training", "tokens/s", "compiled", "ratio", "start, s", "compiled, s")
    for row in record["rows"].values():
        plain, compiled = (row["runs"][system.name] for system in SYSTEMS)
        ratios = [speed(b) / speed(a) for a, b in zip(plain, compiled, strict=True)]
        table.add_row(
            row["title"],
            *(f"{median(map(speed, runs)):,.0f}" for runs in (plain, compiled)),
            f"{median(ratios):.2f}",
            *(f"{median(map(start, runs)):.0f}" for runs in (plain, compiled)),
        )
    yield report.Section("Training with torch.compile", table)


def start(run: dict[str, Any]) -> float:
    """Return the seconds of a process outside the counted updates."""
    return run["process_seconds"] - sum(run["seconds"])
