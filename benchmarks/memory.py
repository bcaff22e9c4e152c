"""Resident memory over long runs, with PyTorch's kernel caches and with those of lorakit.

    python -m benchmarks.memory --data DATA                 2,000 updates per run, hours on one core
    python -m benchmarks.memory --data DATA --blocks 2      the first two blocks of the model, under an hour

DATA has e2e_nlg/train.jsonl.gz and samsum/train.jsonl.gz. SmolLM2-135M in bfloat16, LoRA of rank 8 on q and v. Each run
is a process of its own. "before" runs with PyTorch's caches of 1,024 kernels, or in an older checkout (`--before SRC`).
Two blocks have all shapes of products that the model has, because the last block differs from the others. A run that is
stopped keeps its updates, and `--resume` writes the table and the picture from them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
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
POINT = 10
"""Updates per recorded point."""


# --- one process -------------------------------------------------------------------------------------


def measure(
    data: Path, settings: dict[str, Any], updates: int, blocks: int | None, result: Path
) -> None:
    """Train in this process. Write the resident bytes after each update to `result`, also while it runs."""
    import psutil
    from torch.optim.optimizer import register_optimizer_step_post_hook

    import lorakit
    from lorakit.models.base_config import BaseConfig
    from lorakit.planning import plan
    from lorakit.training.config import CheckpointConfig, OptimizerConfig, TrainConfig
    from lorakit.training.loop import train

    process, resident = psutil.Process(), []
    if blocks:
        _shorten(blocks)
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
        record: dict[str, Any] = {"blocks": blocks, "resident": resident}
        if blocks is None:  # a plan is for the whole model
            planned = plan(config, compare=False)
            record["planned"] = planned.peak(planned.chosen)

        def after_update(*_: Any) -> None:
            resident.append(process.memory_info().rss)
            if len(resident) % 10 == 0 or len(resident) == updates:
                result.write_text(json.dumps(record), encoding="utf-8")

        register_optimizer_step_post_hook(after_update)
        done = train(config)
    record |= {"peak": done.peak_memory, "tokens_per_second": done.tokens / done.seconds}
    result.write_text(json.dumps(record), encoding="utf-8")


def _shorten(blocks: int) -> None:
    """Let training drop all but the first blocks of the base."""
    from lorakit.training import setup

    open_base = setup.open_base

    def open_shortened(*args: Any, **options: Any) -> Any:
        base = open_base(*args, **options)
        base.model.model.layers = base.model.model.layers[:blocks]
        base.model.config.num_hidden_layers = blocks
        return base

    setup.open_base = open_shortened


# --- the benchmark -----------------------------------------------------------------------------------


def main() -> None:
    """Run both data sets before and after, or a single run, and write the table and the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--updates", type=int, default=2000)
    parser.add_argument("--blocks", type=int, help="keep the first blocks only; default: all")
    parser.add_argument("--before", type=Path, help="folder src of an older checkout")
    parser.add_argument("--resume", action="store_true", help="keep the runs that are there")
    parser.add_argument("--run", nargs=2, metavar=("NAME", "FILE"), help="one run, in this process")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if args.run:
        name, file = args.run
        measure(args.data, SETTINGS[name], args.updates, args.blocks, Path(file))
        return
    from benchmarks import report

    folder = report.work(quick=False) / "memory"
    folder.mkdir(parents=True, exist_ok=True)
    for name in SETTINGS:
        for change in CHANGES:
            file = folder / _file_name(name, change, args.blocks)
            if not (args.resume and file.exists()):
                _run(args, name, file, change)
    record: dict[str, Any] = {"machine": report.machine(), "updates_per_point": POINT, "runs": {}}
    for name, change, blocks in product(SETTINGS, CHANGES, (None, args.blocks)):
        file = folder / _file_name(name, change, blocks)
        if file.exists():
            run = json.loads(file.read_text(encoding="utf-8"))
            title = f"{name}{f', {blocks} blocks' if blocks else ''}"
            record["runs"].setdefault(title, {})[change] = _thinned(run)
    report.publish("memory", record, sections(record), quick=False)
    draw(record, Path("docs/results/memory.png"))


def _file_name(name: str, change: str, blocks: int | None) -> str:
    return f"{name.split()[0].strip(',')}-{change}-{blocks or 'all'}.json"


def _thinned(run: dict[str, Any]) -> dict[str, Any]:
    """Replace the resident bytes of each update by the most megabytes of every ten updates."""
    resident = run.pop("resident")
    starts = range(0, len(resident) - POINT + 1, POINT)
    points = [round(max(resident[start : start + POINT]) / 1e6) for start in starts]
    return run | {"megabytes": points}


def _run(args: argparse.Namespace, name: str, file: Path, change: str) -> None:
    environment = dict(os.environ)
    if change == "before":
        environment |= dict.fromkeys(CACHES, "1024")
        if args.before:
            environment["PYTHONPATH"] = str(args.before)
    command = ["-m", "benchmarks.memory", "--data", str(args.data), "--updates", str(args.updates)]
    if args.blocks:
        command += ["--blocks", str(args.blocks)]
    subprocess.run(
        [sys.executable, *command, "--run", name, str(file)], env=environment, check=True
    )


def sections(record: dict[str, Any]) -> Iterator[Any]:
    """Yield the table of resident memory."""
    from benchmarks import report

    table = report.table(
        "run", "planned MB", f"update {EARLY}", "last update", "at the end", "growth"
    )
    for name, runs in record["runs"].items():
        for change, run in runs.items():
            points = run["megabytes"]
            early, late = points[EARLY // POINT - 1], max(points[-EARLY // POINT :])
            planned = f"{run['planned'] / 1e6:,.0f}" if "planned" in run else ""
            table.add_row(
                f"{name}, {change}",
                planned,
                f"{early:,}",
                f"{len(points) * POINT:,}",
                f"{late:,}",
                f"{late / early:.2f}",
            )
    note = (
        f"Resident MB: the most of the {POINT} updates up to update {EARLY}, and of the last {EARLY} updates. Before: "
        "PyTorch's caches. Runs without a number of blocks train the whole model and are shorter."
    )
    yield report.Section("Resident memory", table, note)


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw the resident memory of all runs, one chart per data set and model."""
    from lorakit.reporting.charts import Figure, Series, line_chart
    from lorakit.reporting.drawing import save

    charts = []
    for name, runs in record["runs"].items():
        series = [
            Series(
                name=change,
                points=[(POINT * (i + 1), size / 1e3) for i, size in enumerate(run["megabytes"])],
                colour=CHANGES.index(change),
            )
            for change, run in runs.items()
        ]
        charts.append(line_chart(f"{name}: resident GB", series, x="update", y="GB"))
    save(Figure(caption="Resident memory over long runs.", charts=tuple(charts)), path)


if __name__ == "__main__":
    main()
