"""What torch.compile gains in training, and what it costs at the start: the same updates with and without it.

The runs take turns, in processes of their own. The clock starts after the warm-up updates, in which all is
compiled that the counted ones need; the time until then is the start.
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


def main(*, quick: bool, rows: list[str]) -> None:
    """Measure, and write the table."""
    report.say("\ncompiled: training with and without torch.compile, in turn")
    record: dict[str, Any] = {"machine": report.machine(), "rows": {}}
    for workload in (w for w in WORKLOADS if w.name in ROWS):
        # Lengths differ from batch to batch: some of the first ones compile once more.
        workload = dataclasses.replace(workload, warmup=6, updates=6 if quick else 12)
        runs = runs_of("compiled", workload.name, quick)
        prepared = prepare_once(workload, runs.folder / "examples", workload.base, workload.updates)
        figures: dict[str, list[dict[str, Any]]] = {}
        for number in range(1 if quick else ROUNDS):
            for system in SYSTEMS:
                command = system.command(prepared.folder, held_out=False)
                found = runs.run(f"{number} {system.name}", *command)
                figures.setdefault(system.name, []).append(found)
                report.say(
                    f"  {workload.name}, {system.name:<9} {speed(found):>8,.0f} tokens/s "
                    f"{found['process_seconds']:>6.0f} s"
                )
        record["rows"][workload.name] = {"title": workload.title, "runs": figures}
    made = list(sections(record))
    report.write("compiled", record, made, quick)
    report.show(made)


def sections(record: dict[str, Any]) -> Iterator[report.Section]:
    """Yield the table."""
    made = report.table("training", "tokens/s", "compiled", "ratio", "start, s", "compiled, s")
    for row in record["rows"].values():
        plain, compiled = (row["runs"][system.name] for system in SYSTEMS)
        ratios = [speed(b) / speed(a) for a, b in zip(plain, compiled, strict=True)]
        made.add_row(
            row["title"],
            *(f"{median(map(speed, runs)):,.0f}" for runs in (plain, compiled)),
            f"{median(ratios):.2f}",
            *(f"{median(map(start, runs)):.0f}" for runs in (plain, compiled)),
        )
    yield report.Section("Training with torch.compile", made)


def start(run: dict[str, Any]) -> float:
    """Seconds of a process that are not those of the counted updates."""
    return run["process_seconds"] - sum(run["seconds"])
