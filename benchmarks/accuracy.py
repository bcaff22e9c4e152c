"""What the speed costs in quality: accuracy on MRPC after whole epochs, lorakit's and PEFT's, example by example.

Both train on the same examples in the same batches, each in its fastest precision, and label the same held-out
examples in float32. The interval of the difference is a paired bootstrap over those.

python -m benchmarks.accuracy SYSTEM FOLDER --settings JSON --result FILE    one process
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from scipy.stats import bootstrap
from torch import nn

from benchmarks import report
from benchmarks.examples import Prepared, prepare_whole
from benchmarks.measure import held_out_logits, held_out_loss
from benchmarks.runs import runs_of
from benchmarks.training import OURS, peft
from benchmarks.workloads import SEED, WORKLOADS

EPOCHS = 3
ROW = "mrpc"
PEFT = peft("autocast", "bucketed")
"""PEFT's fastest setting on this row."""
RESAMPLES = 10_000


def main(*, quick: bool, rows: list[str]) -> None:
    """Train, label, and write the table."""
    report.say("\naccuracy: after whole epochs, with and without lorakit")
    workload = next(w for w in WORKLOADS if w.name == ROW)
    workload = dataclasses.replace(workload, epochs=1 if quick else EPOCHS)
    runs = runs_of("accuracy", ROW, quick)
    folder = runs.folder / "examples"
    prepared = (
        Prepared.read(folder)
        if (folder / "examples.json").exists()
        else prepare_whole(workload, folder)
    )
    record: dict[str, Any] = {
        "machine": report.machine(),
        "source": prepared.source,
        "epochs": workload.epochs,
        "updates": len(prepared.batches["bucketed"]),
        "systems": {},
    }
    for system in (OURS, PEFT):
        settings = ["--settings", json.dumps(dict(system.settings))]
        found = runs.run(system.name, "benchmarks.accuracy", system.module, str(folder), *settings)
        record["systems"][system.name] = found
        report.say(f"  {system.name:<28} accuracy {np.mean(found['right']):.4f}")
    made = list(sections(record))
    report.write("accuracy", record, made, quick)
    report.show(made)


def sections(record: dict[str, Any]) -> Iterator[report.Section]:
    """Yield the table."""
    made = report.table("system", "held-out loss", "accuracy")
    for name, found in record["systems"].items():
        made.add_row(name, f"{found['loss']:.4f}", f"{np.mean(found['right']):.2%}")
    ours, theirs = (np.array(record["systems"][s.name]["right"]) for s in (OURS, PEFT))
    low, high = interval(ours, theirs)
    yield report.Section(
        "Accuracy after whole epochs, in the same batches",
        made,
        f"{record['source']}: {record['updates']} updates ({record['epochs']} epochs), {len(ours):,} held-out "
        f"examples. lorakit minus PEFT: {100 * (ours.mean() - theirs.mean()):+.2f} points, 95% interval "
        f"{100 * low:+.2f} to {100 * high:+.2f} (paired bootstrap over the examples, {RESAMPLES:,} resamples). One "
        "seed.",
    )


def interval(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """Return the 95% interval of the difference of two shares of right answers to the same examples."""
    differences = ours.astype(float) - theirs.astype(float)
    if not differences.any():
        return 0.0, 0.0  # no resample differs either
    found = bootstrap(
        (differences,),
        np.mean,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return float(found.low), float(found.high)


def right_labels(model: nn.Module, prepared: Prepared) -> list[bool]:
    """Return whether the model labels each held-out example as the data does, from short ones to long ones."""
    right = []
    for logits, labels in held_out_logits(model, prepared):
        right += (logits.argmax(-1) == labels).tolist()
    return right


def main_of_process() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("system", help="a module of benchmarks.systems")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--settings", type=json.loads, default={})
    parser.add_argument("--result", type=Path, required=True)
    args = parser.parse_args()
    prepared = Prepared.read(args.folder)
    with TemporaryDirectory() as scratch:
        system = import_module(f"benchmarks.systems.{args.system}")
        model = system.train(prepared, args.settings, Path(scratch)).in_float32()
    found = {"loss": held_out_loss(model, prepared), "right": right_labels(model, prepared)}
    args.result.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main_of_process()
