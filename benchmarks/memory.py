"""Resident memory over long runs, with PyTorch's kernel caches and with those of lorakit.

    python -m benchmarks.memory --data DATA                   2,000 updates per run, hours on one core
    python -m benchmarks.memory --data DATA --updates 400     shorter runs

DATA has e2e_nlg/train.jsonl.gz and samsum/train.jsonl.gz. SmolLM2-135M in bfloat16, LoRA of rank 8 on q and v. Each run
is a process of its own. "before" runs with PyTorch's caches of 1,024 kernels, or in an older checkout (`--before SRC`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.workloads import SEED

SETTINGS: dict[str, dict[str, Any]] = {
    "E2E NLG, batches of 8": {
        "train": "e2e_nlg/train.jsonl.gz",
        "columns": {"prompt": "meaning_representation", "completion": "human_reference"},
        "batch_size": 8,
        "max_length": 256,
    },
    "SAMSum, batches of 4": {
        "train": "samsum/train.jsonl.gz",
        "columns": {"prompt": "dialogue", "completion": "summary"},
        "batch_size": 4,
        "max_length": 512,
    },
}
CHANGES = ("before", "after")
CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
EARLY = 50
"""Update whose memory the later ones are compared with."""


# --- one process -------------------------------------------------------------------------------------


def measure(data: Path, settings: dict[str, Any], updates: int, result: Path) -> None:
    """Train in this process. Write the resident bytes after each update to `result`, also while it runs."""
    import psutil
    from torch.optim.optimizer import register_optimizer_step_post_hook

    import lorakit
    from lorakit.models.base_config import BaseConfig
    from lorakit.planning import plan
    from lorakit.training.config import CheckpointConfig, OptimizerConfig, TrainConfig
    from lorakit.training.loop import train

    process, resident = psutil.Process(), []
    with TemporaryDirectory() as scratch:
        config = TrainConfig(
            base=BaseConfig(name="smollm2-135m", dtype="bfloat16"),
            data=lorakit.DataConfig(
                train=str(data / settings["train"]),
                columns=settings["columns"],
                prompt_template="{prompt}\n",
                max_length=settings["max_length"],
                too_long="truncate",
                bad_rows="skip",
            ),
            output=str(Path(scratch) / "run"),
            lora=lorakit.LoRA(rank=8, alpha=16, targets="attention.qv"),
            batch_size=settings["batch_size"],
            max_steps=updates,
            seed=SEED,
            optimizer=OptimizerConfig(learning_rate=1e-3),
            checkpoints=CheckpointConfig(every=updates),
        )
        record = {"planned": plan(config, compare=False).process_peak, "resident": resident}

        def after_update(*_: Any) -> None:
            resident.append(process.memory_info().rss)
            if len(resident) % 10 == 0 or len(resident) == updates:
                result.write_text(json.dumps(record), encoding="utf-8")

        register_optimizer_step_post_hook(after_update)
        done = train(config)
    record |= {"peak": done.peak_memory, "tokens_per_second": done.tokens / done.seconds}
    result.write_text(json.dumps(record), encoding="utf-8")


# --- the benchmark -----------------------------------------------------------------------------------


def main() -> None:
    """Run both data sets before and after, or a single run, and write the table and the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--updates", type=int, default=2000)
    parser.add_argument("--before", type=Path, help="folder src of an older checkout")
    parser.add_argument("--resume", action="store_true", help="keep the runs that are there")
    parser.add_argument("--run", nargs=2, metavar=("NAME", "FILE"), help="one run, in this process")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if args.run:
        measure(args.data, SETTINGS[args.run[0]], args.updates, Path(args.run[1]))
        return
    from benchmarks import report

    folder = report.work(quick=False) / "memory"
    folder.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"machine": report.machine(), "runs": {}}
    for name in SETTINGS:
        for change in CHANGES:
            file = folder / f"{name.split()[0]}-{change}.json"
            if not (args.resume and file.exists()):
                _run(args, name, file, change)
            record["runs"].setdefault(name, {})[change] = json.loads(file.read_text("utf-8"))
    report.publish("memory", record, sections(record), quick=False)
    draw(record, Path("docs/results/memory.png"))


def _run(args: argparse.Namespace, name: str, file: Path, change: str) -> None:
    environment = dict(os.environ)
    if change == "before":
        environment |= dict.fromkeys(CACHES, "1024")
        if args.before:
            environment["PYTHONPATH"] = str(args.before)
    command = ["-m", "benchmarks.memory", "--data", str(args.data), "--updates", str(args.updates)]
    subprocess.run(
        [sys.executable, *command, "--run", name, str(file)], env=environment, check=True
    )


def sections(record: dict[str, Any]) -> Iterator[Any]:
    """Yield the table of resident memory by update."""
    from benchmarks import report

    table = report.table(
        "run", "planned GB", f"after {EARLY} updates", "at the end", "updates", "growth"
    )
    for name, runs in record["runs"].items():
        for change, run in runs.items():
            resident = run["resident"]
            early, late = resident[EARLY - 1], max(resident[-EARLY:])
            table.add_row(
                f"{name}, {change}",
                *(f"{size / 1e9:.2f}" for size in (run["planned"], early, late)),
                f"{len(resident):,}",
                f"{late / early:.2f}",
            )
    yield report.Section("Resident memory", table, f"At the end: the most of the last {EARLY}.")


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw the resident memory of all runs, one chart per data set."""
    from lorakit.reporting.charts import Figure, Series, line_chart
    from lorakit.reporting.drawing import save

    charts = []
    for name, runs in record["runs"].items():
        series = []
        for change, run in runs.items():
            sizes = [size / 1e9 for size in run["resident"]]
            # The range hides single updates: draw the largest of ten.
            tens = [(i + 10, max(sizes[i : i + 10])) for i in range(0, len(sizes), 10)]
            series.append(Series(name=change, points=tens))
        charts.append(line_chart(f"{name}: resident GB", series, x="update", y="GB"))
    save(Figure(caption="Resident memory over long runs.", charts=tuple(charts)), path)


if __name__ == "__main__":
    main()
