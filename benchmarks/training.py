"""Training speed, memory and loss of lorakit, PEFT, loralib and full fine-tuning.

Every run is a separate process. The systems of a row alternate, round after round, so that a slow phase of the
machine affects all of them. The first round runs PEFT in several settings; later rounds repeat its default and its
fastest setting. Each run starts with a sample of the matmul rate of the machine.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks import limit, report
from benchmarks.examples import Prepared, prepare
from benchmarks.large_model import large_llama
from benchmarks.runs import Runs, runs_of
from benchmarks.systems import load_model
from benchmarks.training_tables import sections, speed
from benchmarks.workloads import WORKLOADS, Workload
from lorakit.models.dtype_choice import compute_dtype
from lorakit.models.dtypes import dtype_name

ROUNDS = 3
PRECISIONS = {"float32": "float32", "autocast": "bf16 autocast", "bfloat16": "bf16 weights"}


@dataclass(frozen=True)
class System:
    """A module of benchmarks.systems with its settings and its name in the tables."""

    name: str
    module: str
    settings: tuple[tuple[str, Any], ...] = ()

    def command(self, folder: Path, *, held_out: bool) -> list[str]:
        """Return the module and the arguments that run it."""
        settings = ["--settings", json.dumps(dict(self.settings))]
        score = ["--held-out"] if held_out else []
        return ["benchmarks.run", self.module, str(folder), *settings, *score]


OURS = System("lorakit", "lorakit_train")


def peft(precision: str, order: str) -> System:
    """Return PEFT in one of its settings."""
    return System(
        f"PEFT, {PRECISIONS[precision]}, {order}",
        "peft_trainer",
        (("precision", precision), ("order", order)),
    )


def peft_settings(workload: Workload, *, every: bool) -> list[System]:
    """Return all of PEFT's settings, or its default and those that win where all are compared."""
    if every:
        return [peft(p, o) for p, o in product(PRECISIONS, workload.orders)]
    fast = [peft(p, workload.orders[-1]) for p in ("autocast", "bfloat16")]
    return [peft("float32", workload.orders[0]), *fast]


def others(workload: Workload) -> list[System]:
    """Return the systems other than lorakit and PEFT."""
    order = (("order", workload.orders[-1]),)
    return [
        System(f"loralib, {workload.orders[-1]}", "loralib_loop", order),
        System("full fine-tuning, lorakit", "lorakit_train", (("method", "full"),)),
        System(f"full fine-tuning, Trainer, {workload.orders[-1]}", "full_trainer", order),
    ]


def main(*, quick: bool, rows: Sequence[str] = ()) -> None:
    """Measure the given rows, or all."""
    report.say("training: lorakit, PEFT, loralib and full fine-tuning")
    chosen = [w for w in WORKLOADS if (w.name in rows if rows else w.quick_updates or not quick)]
    record = _earlier(quick) if rows else {}
    with TemporaryDirectory() as scratch:
        large = large_llama(Path(scratch) / "llama-1b") if torch.cuda.is_available() else None
        for workload in chosen:
            workload = workload.on_gpu() if large else workload
            runs = runs_of("training", workload.name, quick)
            base = large if large and workload.task == "completion" else workload.base
            updates = (workload.quick_updates or 2) if quick else workload.updates
            prepared = prepare_once(workload, runs.folder / "examples", base, updates)
            record[workload.name] = measure(prepared, runs, quick=quick)
            # Write after each row, so that a failing row does not lose an hour of work.
            report.write("training", record, sections(record), quick)
            report.show(sections({workload.name: record[workload.name]}))


def prepare_once(workload: Workload, folder: Path, base: str, updates: int) -> Prepared:
    """Prepare the examples of a row, unless the cached runs have the same examples.

    Raises:
        RuntimeError: The cached runs have other settings.
    """
    if (folder / "examples.json").exists():
        prepared = Prepared.read(folder)
        if prepared.workload == workload and prepared.updates == updates:
            return prepared
        raise RuntimeError(
            f"The cached runs of '{workload.name}' have other settings. Start again without --resume."
        )
    return prepare(workload, folder, base=base, updates=updates)


def measure(prepared: Prepared, runs: Runs, *, quick: bool) -> dict[str, Any]:
    """Run the systems of a row, and return its results."""
    workload = prepared.workload
    rounds = 1 if quick else ROUNDS
    report.say(
        f"\n{workload.name}: {workload.title}; {prepared.source}, {workload.warmup} + {prepared.updates} updates"
    )
    everything = workload.compares_all and not quick
    settings = peft_settings(workload, every=everything)
    default, best = settings[0], settings[0]
    extra = others(workload) if everything else []
    machine = Machine(prepared)
    figures: dict[str, list[dict[str, Any]]] = {}
    for number in range(rounds):
        peers = settings if number == 0 else list(dict.fromkeys([default, best]))
        for system in (OURS, *peers, *extra):
            key = f"{number} {system.name}"
            run = runs.cached(key)
            if run is None:
                command = system.command(prepared.folder, held_out=number == 0)
                run = runs.run(key, *command, rate=machine.sample())
            figures.setdefault(system.name, []).append(run)
            report.say(
                f"  {number + 1}/{rounds}  {system.name:<40} {speed(run):>8,.0f} tokens/s "
                f"{run['process_seconds']:>6.0f} s; machine {run['rate'] / 1e9:,.0f} GFLOP/s"
            )
        if number == 0:
            best = max(settings, key=lambda s: speed(figures[s.name][0]))
    return {
        "title": workload.title,
        "source": prepared.source,
        "machine": report.machine(),
        "default": default.name,
        "best": best.name,
        "sweep": [s.name for s in settings],
        "systems": [s.name for s in dict.fromkeys([OURS, default, best, *extra])],
        "left_out": [] if extra else [s.name.split(",")[0] for s in others(workload)],
        "limit": machine.limit(),
        "runs": figures,
    }


class Machine:
    """The operations that a row needs, and the matmul rate of this machine while the row runs."""

    def __init__(self, prepared: Prepared) -> None:
        order = prepared.workload.orders[-1]
        batches = prepared.in_order(order)[prepared.workload.warmup :]
        task = prepared.workload.task
        self.shapes = limit.shapes_of(load_model(prepared, "float32"), task)
        self.counts = [limit.counts_of(batch, task) for batch in batches]
        self.dtype = compute_dtype("auto")
        self.tokens = prepared.tokens(order)[prepared.workload.warmup :]

    def sample(self) -> float:
        """Return the current operations per second, for a batch of median size."""
        middle = sorted(self.counts, key=lambda c: c.tokens)[len(self.counts) // 2]
        return limit.sample_rate(self.shapes, middle, self.dtype)

    def limit(self) -> dict[str, Any]:
        """Return the operations of each batch, and the counts that they come from."""
        return {
            "dtype": dtype_name(self.dtype),
            "operations": [limit.operations(self.shapes, c) for c in self.counts],
            "tokens": self.tokens,
            "counts": [asdict(c) for c in self.counts],
        }


def _earlier(quick: bool) -> dict[str, Any]:
    """Return the rows of an earlier run, to keep when only some rows run."""
    path = report.folder(quick) / "training.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
