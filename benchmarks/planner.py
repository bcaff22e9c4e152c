"""Predictions of `lorakit plan` against measurements, over models, lengths, batches, ranks, targets and dtypes.

Every cell trains for a few updates in its own process, once per round; the table shows medians. Memory is the peak
after the first update, minus that of the interpreter with torch imported. Each cell has two predictions: from a short
measurement of the machine, and from a calibration with two runs of a model that is in no cell.

python -m benchmarks.planner CELL --result FILE    one process
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.before import BEFORE
from benchmarks.measure import Meter

ROUNDS = 3
WARMUP, UPDATES = 1, 2
LOW, HIGH = -0.05, 0.15
"""Accepted relative error of predicted memory."""
TIME = 0.30
"""Accepted relative error of predicted time."""
CALIBRATED_TIME = 0.20
"""Accepted relative error of predicted time after calibration."""

TEXT = (
    "time year people way day man thing woman life child world school state family student group country "
    "problem hand part place case week company system program question work number night point home water "
    "room mother area money story fact month lot right study book eye job word business issue side kind head "
    "house service friend father power hour game line end member law car city name"
)
WORDS = TEXT.split(" ")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A training run whose examples all have the same length."""

    base: str
    length: int
    targets: int = 1
    """Target tokens per example. Classifiers ignore it."""
    batch_size: int
    rank: int = 8
    where: str = "attention.qv"
    dtype: str = "bfloat16"
    checkpointing: bool = False
    quick: bool = False

    @property
    def name(self) -> str:
        """Name of the cell in the table."""
        extra = ", checkpointing" if self.checkpointing else ""
        return (
            f"{self.base}, {self.batch_size} x {self.length}, r {self.rank} on {self.where}, "
            f"{self.dtype}{extra}"
        )


SMOL, MINI = "smollm2-135m", "minilm-l6"
CELLS = (
    Cell(base=SMOL, length=40, targets=16, batch_size=5, quick=True),
    Cell(base=SMOL, length=80, targets=30, batch_size=12, rank=16, where="all-linear"),
    Cell(base=SMOL, length=160, targets=50, batch_size=3, rank=4, where="mlp"),
    Cell(base=SMOL, length=56, targets=24, batch_size=10, dtype="float32"),
    Cell(base=SMOL, length=80, targets=30, batch_size=12, checkpointing=True),
    Cell(base=MINI, length=72, batch_size=20, where="attention", quick=True),
    Cell(base=MINI, length=160, batch_size=12, rank=32, where="all-linear"),
    Cell(base=MINI, length=56, batch_size=24, dtype="float32", quick=True),
    Cell(base=MINI, length=240, batch_size=10, rank=4, where="mlp", dtype="float32"),
)


# --- one process -------------------------------------------------------------------------------------


def config_of(cell: Cell, folder: Path) -> Any:
    """Write the data of the cell and return its configuration."""
    import lorakit
    from lorakit.data import DataConfig
    from lorakit.models.base_config import BaseConfig
    from lorakit.training.config import TrainConfig

    draw = random.Random(0)

    def text(words: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(words))

    rows: list[dict[str, Any]] = []
    for number in range(cell.batch_size * (WARMUP + UPDATES)):
        if cell.base == MINI:
            rows.append({"text": text(cell.length + 20), "label": number % 2})
        else:  # longer than max_length, so that truncation gives the exact length
            prompt = text(cell.length + 20 - cell.targets)
            rows.append({"prompt": prompt, "completion": f" {text(cell.targets - 1)}"})
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return TrainConfig(
        base=BaseConfig(name=cell.base, dtype=cell.dtype),  # type: ignore[arg-type]
        data=DataConfig(train=str(data), max_length=cell.length, too_long="truncate"),
        output=str(folder / "run"),
        lora=lorakit.LoRA(rank=cell.rank, targets=cell.where),
        batch_size=cell.batch_size,
        gradient_checkpointing=cell.checkpointing,
        max_steps=WARMUP + UPDATES,
    )


def measure(cell: Cell) -> dict[str, Any]:
    """Train in this process."""
    with TemporaryDirectory() as scratch, Meter(WARMUP, BEFORE) as meter:
        from lorakit.training.loop import train

        train(config_of(cell, Path(scratch)))
    return {
        "memory": meter.memory,
        "loading_memory": meter.loading_memory,
        "seconds": median(meter.seconds),
    }


def main_of_process() -> None:
    # Not `runs.process_parser`: its imports would count as memory.
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cell", type=json.loads)
    parser.add_argument("--result", type=Path, required=True)
    args = parser.parse_args()
    args.result.write_text(json.dumps(measure(Cell(**args.cell))), encoding="utf-8")


# --- the benchmark -----------------------------------------------------------------------------------


def main(*, quick: bool) -> None:
    """Predict and measure every cell."""
    import torch

    from benchmarks import report
    from benchmarks.runs import runs_of
    from lorakit.planning.calibration import calibrate
    from lorakit.planning.machine import measure as measure_machine

    report.say("planner: predictions and measurements")
    record: dict[str, Any] = {"machine": report.machine(), "cells": {}}
    runs = runs_of("planner", "cells", quick)
    cells = [cell for cell in CELLS if cell.quick or not quick]
    cpu = torch.device("cpu")
    machines = {name: calibrate(cpu, getattr(torch, name)) for name in {c.dtype for c in cells}}
    for number in range(1 if quick else ROUNDS):
        for cell in cells:
            row = record["cells"].setdefault(cell.name, {"runs": []})
            if number == 0:
                row["predicted"] = predict(cell, measure_machine(cpu, getattr(torch, cell.dtype)))
                row["calibrated"] = predict(cell, machines[cell.dtype])
            settings = json.dumps(dataclasses.asdict(cell))
            row["runs"].append(runs.run(f"{number} {cell.name}", "benchmarks.planner", settings))
            report.say(f"  {number + 1}  {_line(cell.name, row)}")
    section = report.Section("Predicted and measured", _table(record), _note(record))
    report.publish("planner", record, [section], quick)


def predict(cell: Cell, machine: Any) -> dict[str, Any]:
    """Return the plan of a cell."""
    from lorakit.planning import plan

    with TemporaryDirectory() as scratch:
        return plan(config_of(cell, Path(scratch)), compare=False, machine=machine).as_dict()


def _measured(row: dict[str, Any]) -> tuple[float, float, float]:
    """Return median memory, its relative range, and median time."""
    memory = [run["memory"] for run in row["runs"]]
    spread = (max(memory) - min(memory)) / median(memory)
    return median(memory), spread, median(run["seconds"] for run in row["runs"])


def _errors(row: dict[str, Any], how: str = "predicted") -> tuple[float, float]:
    """Return the relative errors of the predicted memory and time."""
    memory, _, seconds = _measured(row)
    chosen = row[how]["chosen"]
    # What is measured excludes the interpreter, as older records of plans do too.
    predicted = chosen["memory"]["total"] - chosen["memory"].get("interpreter", 0)
    return predicted / memory - 1, chosen["seconds"] / seconds - 1


def _line(name: str, row: dict[str, Any]) -> str:
    memory, _, seconds = _measured(row)
    errors = _errors(row)
    return f"{name}: {memory / 1e6:,.0f} MB ({errors[0]:+.1%}), {seconds:.2f} s ({errors[1]:+.0%})"


def _table(record: dict[str, Any]) -> Any:
    from benchmarks import report

    table = report.table(
        "cell",
        *("measured MB", "spread", "predicted", "calibrated"),
        *("measured s", "predicted ", "calibrated "),
    )
    for name, row in record["cells"].items():
        memory, spread, seconds = _measured(row)
        memory_errors, time_errors = zip(_errors(row), _errors(row, "calibrated"), strict=True)
        table.add_row(
            name,
            f"{memory / 1e6:,.0f}",
            f"{spread:.1%}",
            *(f"{error:+.1%}" for error in memory_errors),
            f"{seconds:.2f}",
            *(f"{error:+.0%}" for error in time_errors),
        )
    return table


def _note(record: dict[str, Any]) -> str:
    def inside(how: str, limit: float) -> str:
        errors = [_errors(row, how) for row in record["cells"].values()]
        memory = sum(LOW <= error <= HIGH for error, _ in errors)
        time = sum(abs(error) <= limit for _, error in errors)
        return (
            f"memory error from {LOW:+.0%} to {HIGH:+.0%} in {memory} of {len(errors)} cells, time error up to "
            f"{limit:.0%} in {time}"
        )

    first = next(iter(record["cells"].values()))
    return (
        f"Predicted ({first['predicted']['machine']['origin']}): {inside('predicted', TIME)}. "
        f"Calibrated (two short runs of another model): {inside('calibrated', CALIBRATED_TIME)}."
    )


if __name__ == "__main__":
    main_of_process()
