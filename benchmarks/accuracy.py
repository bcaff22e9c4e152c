"""Accuracy on MRPC after whole epochs, lorakit against PEFT, to check that speed does not cost quality.

Both train on the same examples in the same batches, each in its fastest precision, once per seed. Both then label the
same held-out examples in float32. The difference has an interval over the seeds, which decides, and one over the
examples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import bootstrap, ttest_1samp

from benchmarks import report
from benchmarks.examples import Prepared, prepare_whole
from benchmarks.runs import Runs, runs_of
from benchmarks.training import OURS, System, peft
from benchmarks.workloads import SEED, WORKLOADS

EPOCHS = 3
ROW = "mrpc"
PEFT = peft("autocast", "bucketed")
"""PEFT's fastest setting on this row."""
SEEDS = (0, 1, 2)
RESAMPLES = 10_000


def main(*, quick: bool) -> None:
    """Train and score both systems, and write the table."""
    report.say("\naccuracy: lorakit and PEFT after whole epochs")
    workload = next(w for w in WORKLOADS if w.name == ROW)
    workload = dataclasses.replace(workload, epochs=1 if quick else EPOCHS)
    runs = runs_of("accuracy", ROW, quick)
    record: dict[str, Any] = {"machine": report.machine(), "epochs": workload.epochs, "seeds": {}}
    for seed in SEEDS[: 1 if quick else None]:
        folder = runs.folder / f"examples-{seed}"
        prepared = (
            Prepared.read(folder)
            if (folder / "examples.json").exists()
            else prepare_whole(dataclasses.replace(workload, seed=seed), folder)
        )
        record |= {"source": prepared.source, "updates": prepared.updates + workload.warmup}
        scores = {s.name: _run(runs, s, seed, folder) for s in (OURS, PEFT)}
        record["seeds"][str(seed)] = scores
        tables = list(sections(record))
        report.write("accuracy", record, tables, quick)
    report.show(tables)


def _run(runs: Runs, system: System, seed: int, folder: Path) -> dict[str, Any]:
    run = runs.run(f"{seed} {system.name}", *system.command(folder, held_out=True), "--labels")
    scores = {name: run[name] for name in ("right", "process_seconds")} | {"loss": run["held_out"]}
    report.say(f"  seed {seed}  {system.name:<28} accuracy {np.mean(scores['right']):.4f}")
    return scores


def sections(record: dict[str, Any]) -> Iterator[report.Section]:
    """Yield the table with one row per seed and their mean."""
    names = (OURS.name, PEFT.name)
    table = report.table(
        "seed", *(f"{name}: {score}" for score in ("loss", "accuracy") for name in names)
    )
    seeds = record["seeds"]
    losses = np.array([[scores[name]["loss"] for name in names] for scores in seeds.values()])
    right = np.array([[scores[name]["right"] for name in names] for scores in seeds.values()])
    shares = right.mean(-1)
    for label, loss, share in (
        *zip(seeds, losses, shares, strict=True),
        ("mean", losses.mean(0), shares.mean(0)),
    ):
        table.add_row(label, *(f"{x:.4f}" for x in loss), *(f"{x:.2%}" for x in share))
    # For each example, the fraction of seeds that label it correctly; averages out the noise of single seeds.
    ours, theirs = right.mean(0)
    low, high = interval(ours, theirs)
    by_seed = ""
    if len(seeds) > 1:
        found = ttest_1samp(100 * (shares[:, 0] - shares[:, 1]), 0).confidence_interval()
        by_seed = f"{found.low:+.2f} to {found.high:+.2f} over the seeds (Student's t), "
    yield report.Section(
        "Accuracy after whole epochs, in the same batches",
        table,
        f"{record['source']}: {record['updates']} updates ({record['epochs']} epochs), {len(ours):,} held-out "
        f"examples. lorakit minus PEFT, over {len(seeds)} seeds: {100 * (ours.mean() - theirs.mean()):+.2f} points, "
        f"95% interval {by_seed}{100 * low:+.2f} to {100 * high:+.2f} over the examples (paired bootstrap, "
        f"{RESAMPLES:,} resamples); loss {losses[:, 0].mean() / losses[:, 1].mean() - 1:+.1%}.",
    )


def interval(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """Return the 95% interval of the difference between two means over the same examples."""
    differences = ours.astype(float) - theirs.astype(float)
    if not differences.any():
        return 0.0, 0.0  # every resample has difference 0
    result = bootstrap(
        (differences,),
        np.mean,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return float(result.low), float(result.high)
