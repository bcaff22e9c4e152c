"""One long run per order of the data: held-out loss and BLEU against updates and against time.

    python -m benchmarks.long_run --data E2E                 3,000 updates each, over an hour on two cores
    python -m benchmarks.long_run --data E2E --updates 800   a shorter one
    python -m benchmarks.long_run --data E2E --resume        resume an interrupted run

E2E is a folder with train.jsonl.gz and validation.jsonl (columns meaning_representation, human_reference).
Only the order differs: SmolLM2-135M, LoRA of rank 8 on q and v, batches of 16, one seed.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

import lorakit
from benchmarks import report
from benchmarks.workloads import SEED
from lorakit.models.base_config import BaseConfig
from lorakit.training.config import (
    CheckpointConfig,
    HeldOutConfig,
    OptimizerConfig,
    Sampling,
    TrainConfig,
)
from lorakit.training.loop import train

ORDERS: tuple[Sampling, ...] = ("random", "grouped")
EVALUATIONS = 8
SAMPLES, HELD_OUT = 100, 300
"""Per evaluation: distinct inputs to generate text for, and validation pairs for the held-out loss."""


def configuration(
    data: Path, output: Path, order: Literal["random", "grouped"], updates: int, resume: bool
) -> TrainConfig:
    """Return the configuration of the run with one order."""
    return TrainConfig(
        base=BaseConfig(name="smollm2-135m"),
        data=lorakit.DataConfig(
            train=str(data / "train.jsonl.gz"),
            validation=str(data / "validation.jsonl"),
            columns={"prompt": "meaning_representation", "completion": "human_reference"},
            prompt_template="{prompt}\n",
            max_length=256,
        ),
        output=str(output),
        lora=lorakit.LoRA(rank=8, alpha=16, targets="attention.qv"),
        sampling=order,
        max_steps=updates,
        seed=SEED,
        optimizer=OptimizerConfig(learning_rate=1e-3),
        evaluation=HeldOutConfig(
            every=max(updates // EVALUATIONS, 1), limit=HELD_OUT, samples=SAMPLES
        ),
        checkpoints=CheckpointConfig(every=max(updates // EVALUATIONS, 1)),
        resume=resume and (output / "config.yaml").exists(),
        overwrite=not resume,
    )


def main() -> None:
    """Train in both orders, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--updates", type=int, default=3000)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    record: dict[str, Any] = {"machine": report.machine(), "updates": args.updates, "orders": {}}
    for order in ORDERS:
        folder = report.work(quick=False) / "long_run" / order
        folder.parent.mkdir(parents=True, exist_ok=True)
        train(configuration(args.data, folder, order, args.updates, args.resume))
        record["orders"][order] = course(folder)
    report.publish("long_run", record, sections(record), quick=False)


def course(folder: Path) -> list[dict[str, Any]]:
    """Return the scores of each evaluation, with the seconds and tokens of training before it."""
    points = []
    last: dict[str, Any] = {"seconds": 0.0, "tokens": 0, "computed_tokens": 0}
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["split"] == "train":
            last = row
            continue
        scores = {name: row[name] for name in ("step", "loss", "bleu", "rouge_l")}
        points.append(
            scores | {name: last[name] for name in ("seconds", "tokens", "computed_tokens")}
        )
    return points


def sections(record: dict[str, Any]) -> Iterator[report.Section]:
    """Yield the tables: against updates, and against time."""
    table = report.table(
        "updates",
        *(
            f"{order}: {name}"
            for order in ORDERS
            for name in ("minutes", "loss", "BLEU", "ROUGE-L")
        ),
    )
    for points in zip(*(record["orders"][order] for order in ORDERS), strict=True):
        cells = [
            cell
            for p in points
            for cell in (
                f"{p['seconds'] / 60:.1f}",
                f"{p['loss']:.4f}",
                f"{p['bleu']:.1f}",
                f"{p['rouge_l']:.1f}",
            )
        ]
        table.add_row(f"{points[0]['step']:,}", *cells)
    note = (
        f"Loss over {HELD_OUT} validation pairs. BLEU and ROUGE-L of greedy outputs for {SAMPLES} distinct "
        "validation inputs against all their references. Minutes exclude evaluation."
    )
    yield report.Section("E2E NLG, SmolLM2-135M, q and v, batches of 16", table, note)
    yield report.Section("Held-out loss after equal time", at_equal_times(record["orders"]))


def at_equal_times(orders: dict[str, list[dict[str, Any]]]) -> Any:
    """Return a table of the losses of both orders at the same times, interpolated between their evaluations."""
    table = report.table(
        "minutes", *(f"{order}: {name}" for order in ORDERS for name in ("updates", "loss"))
    )
    shortest = min(points[-1]["seconds"] for points in orders.values())
    for share in (0.25, 0.5, 0.75, 1.0):
        until = shortest * share
        cells = []
        for order in ORDERS:
            seconds, steps, losses = (
                [p[name] for p in orders[order]] for name in ("seconds", "step", "loss")
            )
            step, loss = (np.interp(until, seconds, values) for values in (steps, losses))
            cells += [f"{step:,.0f}", f"{loss:.4f}"]
        table.add_row(f"{until / 60:.1f}", *cells)
    return table


if __name__ == "__main__":
    main()
