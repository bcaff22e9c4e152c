"""Training speed, memory and loss of lorakit beside PEFT, loralib and full fine-tuning.

Every run is a process of its own. The systems of a row take turns, round after round, so that a machine that
slows down slows all of them; so does the measurement of the machine's limit. In the first round PEFT runs in
each of its settings, and the fastest goes on as its best. A row's figures are medians over the rounds.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.table import Table

from benchmarks import report
from benchmarks.examples import Prepared, prepare
from benchmarks.large_model import large_llama
from benchmarks.workloads import WORKLOADS, Workload

ROUNDS = 3
PRECISIONS = ("float32", "autocast", "bfloat16")
PRECISION_NAMES = {"float32": "float32", "autocast": "bf16 autocast", "bfloat16": "bf16 weights"}
LIMIT = "limit"


@dataclass(frozen=True)
class System:
    """A module of benchmarks.systems with its settings, under the name that tables show."""

    name: str
    module: str
    settings: tuple[tuple[str, str], ...] = ()

    def command(self, folder: Path, *, held_out: bool) -> list[str]:
        """Return what runs it."""
        settings = ["--settings", json.dumps(dict(self.settings))]
        scored = ["--held-out"] if held_out else []
        return ["benchmarks.run", self.module, str(folder), *settings, *scored]


OURS = System("lorakit", "lorakit_train")


def peft(precision: str, order: str) -> System:
    """Return PEFT in one of its settings."""
    return System(
        f"PEFT, {PRECISION_NAMES[precision]}, {order}",
        "peft_trainer",
        (("precision", precision), ("order", order)),
    )


def others(workload: Workload) -> list[System]:
    """Return what runs beside lorakit and PEFT."""
    order = (("order", workload.orders[-1]),)
    return [
        System(f"loralib, {workload.orders[-1]}", "loralib_loop", order),
        System("full fine-tuning, lorakit", "lorakit_train", (("method", "full"),)),
        System(f"full fine-tuning, Trainer, {workload.orders[-1]}", "full_trainer", order),
    ]


def main(*, quick: bool, rows: list[str]) -> None:
    """Measure the rows named, or all."""
    report.say("training: lorakit, PEFT, loralib and full fine-tuning in turn")
    chosen = [w for w in WORKLOADS if (w.name in rows if rows else w.quick_updates or not quick)]
    kept = _earlier(quick) if rows else {}
    best: System | None = None
    with TemporaryDirectory() as scratch:
        base = large_llama(Path(scratch) / "llama-1b") if torch.cuda.is_available() else None
        for workload in chosen:
            updates = (workload.quick_updates or 2) if quick else workload.updates
            prepared = prepare(
                workload,
                Path(scratch) / workload.name,
                base=base if base and workload.task == "completion" else workload.base,
                updates=updates,
            )
            sweeps = best is None or (workload.sweeps and not quick)
            best, figures = measure(
                prepared, rounds=1 if quick else ROUNDS, best=best, sweeps=sweeps, quick=quick
            )
            kept[workload.name] = figures
            # After each row: an hour's work should survive a row that fails.
            report.write("training", kept, sections(kept), quick)
            report.show(sections({workload.name: figures}))


def measure(
    prepared: Prepared, *, rounds: int, best: System | None, sweeps: bool, quick: bool
) -> tuple[System, dict[str, Any]]:
    """Run the systems of a row; return PEFT's fastest setting and the row's figures."""
    workload = prepared.workload
    report.say(
        f"\n{workload.name}: {workload.title}; {prepared.source}, {workload.warmup} + "
        f"{len(prepared.batches[workload.orders[-1]]) - workload.warmup} updates"
    )
    default = peft("float32", workload.orders[0])
    settings = [peft(p, o) for p, o in product(PRECISIONS, workload.orders)]
    beside = others(workload) if workload.others and not quick else []
    runs: dict[str, list[dict[str, Any]]] = {}
    if best is not None:
        best = _in_order(best, workload)
    for number in range(rounds):
        if sweeps and number == 0:
            peers = settings
        else:
            assert best is not None
            peers = list(dict.fromkeys([default, best]))
        for system in (None, OURS, *peers, *beside):
            name = LIMIT if system is None else system.name
            figures = _run(system, prepared, held_out=number == 0)
            runs.setdefault(name, []).append(figures)
            report.say(f"  {number + 1}/{rounds}  {name:<40} {_speed(figures):>8,.0f} tokens/s")
        if sweeps and number == 0:
            best = max(settings, key=lambda s: _speed(runs[s.name][0]))
    assert best is not None
    return best, {
        "title": workload.title,
        "source": prepared.source,
        "machine": report.machine(),
        "default": default.name,
        "best": best.name,
        "sweep": [s.name for s in settings] if sweeps else [],
        "systems": [s.name for s in dict.fromkeys([OURS, default, best, *beside])],
        "runs": runs,
    }


def _in_order(best: System, workload: Workload) -> System:
    """The fastest setting of another row, in an order that this row has."""
    settings = dict(best.settings)
    order = settings["order"] if settings["order"] in workload.orders else workload.orders[-1]
    return peft(settings["precision"], order)


def _run(system: System | None, prepared: Prepared, *, held_out: bool) -> dict[str, Any]:
    """Run a system, or where it is None the measurement of the limit; return its figures."""
    result = prepared.folder / "result.json"
    command = (
        ["benchmarks.limit", str(prepared.folder)]
        if system is None
        else system.command(prepared.folder, held_out=held_out)
    )
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", *command, "--result", str(result)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    figures = json.loads(result.read_text(encoding="utf-8"))
    return {**figures, "process_seconds": time.perf_counter() - began}


def _speed(run: dict[str, Any]) -> float:
    """Tokens per second, each example's in full, over the counted updates of a run."""
    return sum(run["tokens"]) / sum(run["seconds"])


def sections(results: dict[str, dict[str, Any]]) -> list[tuple[str, Table]]:
    """Return the tables of each row: its systems, and PEFT's settings where they were compared."""
    made = []
    for row in results.values():
        made.append((f"{row['title']}", comparison(row)))
        if row["sweep"]:
            made.append((f"PEFT's settings: {row['title']}", sweep(row)))
    return made


def comparison(row: dict[str, Any]) -> Table:
    """The systems of a row beside PEFT's default, its best, and the limit."""
    speeds = {name: [_speed(run) for run in runs] for name, runs in row["runs"].items()}
    middle = {name: median(values) for name, values in speeds.items()}
    middle[LIMIT] = max(speeds[LIMIT])  # what the machine can do, not what it usually does
    made = report.table(
        "system",
        "tokens/s",
        "range",
        "x PEFT's default",
        "x PEFT's best",
        "share of the limit",
        "peak memory, MB",
        "held-out loss",
        "trained",
    )
    for name in row["systems"]:
        runs = row["runs"][name]
        label = name + (" (default)" if name == row["default"] else "")
        label += " (best)" if name == row["best"] else ""
        made.add_row(
            label,
            f"{middle[name]:,.0f}",
            f"{min(speeds[name]):,.0f} to {max(speeds[name]):,.0f}",
            f"{middle[name] / middle[row['default']]:.2f}",
            f"{middle[name] / middle[row['best']]:.2f}",
            # The limit is that of thin matrices: to train the weights takes half as many products again.
            "" if name.startswith("full") else f"{middle[name] / middle[LIMIT]:.0%}",
            f"{median(run['memory'] for run in runs) / 1e6:,.0f}",
            f"{runs[0]['held_out']:.4f}",
            f"{runs[0]['trained']:,}",
        )
    made.add_row(
        f"limit, {row['runs'][LIMIT][0]['dtype']} products at "
        f"{max(run['rate'] for run in row['runs'][LIMIT]) / 1e9:,.0f} GFLOP/s",
        f"{middle[LIMIT]:,.0f}",
        f"{min(speeds[LIMIT]):,.0f} to {max(speeds[LIMIT]):,.0f}",
        f"{middle[LIMIT] / middle[row['default']]:.2f}",
        f"{middle[LIMIT] / middle[row['best']]:.2f}",
        *[""] * 4,
    )
    return made


def sweep(row: dict[str, Any]) -> Table:
    """PEFT's settings, one run each."""
    made = report.table("setting", "tokens/s", "peak memory, MB", "held-out loss")
    for name in row["sweep"]:
        run = row["runs"][name][0]
        made.add_row(
            name, f"{_speed(run):,.0f}", f"{run['memory'] / 1e6:,.0f}", f"{run['held_out']:.4f}"
        )
    return made


def _earlier(quick: bool) -> dict[str, Any]:
    """The rows measured before, which a run of some rows leaves as they are."""
    path = report.folder(quick) / "training.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
