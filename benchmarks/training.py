"""Training speed, memory and loss of lorakit, PEFT, TRL, loralib and full fine-tuning.

Every run is a separate process. The systems of a row take turns in a random order, round after round, so that a slow
phase of the machine affects all. The first round runs PEFT and TRL in several settings; later rounds repeat PEFT in
float32 and the settings that may be the fastest. So TRL's default, the slowest of its settings, usually runs once.
Each run starts with a sample of the matmul rate and of the memory bandwidth of the machine.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import median
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
from lorakit.models.base_config import BaseConfig
from lorakit.models.dtype_choice import resolve_dtype
from lorakit.models.dtypes import dtype_name, dtype_of_name

ROUNDS = 3
PRECISIONS = {
    "float32": "float32",
    "autocast": "bf16 autocast",
    "bfloat16": "bf16 weights",
    "bfloat16 autocast": "bf16 weights and autocast",
}
NEAR = 0.85
"""Settings at least this fast, relative to the fastest in the first round, run in every round: one run may meet a slow
moment of the machine."""


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
    """Return all of PEFT's settings, or float32 and those that win where all are compared."""
    if every:
        return [peft(p, o) for p, o in product(PRECISIONS, workload.orders)]
    fast = [peft(p, workload.orders[-1]) for p in PRECISIONS if p != "float32"]
    return [peft("float32", workload.orders[0]), *fast]


def trl(precision: str, order: str, *, padding_free: bool = False) -> System:
    """Return TRL in one of its settings, without gradient checkpointing unless the row asks for it."""
    name = f"TRL, {PRECISIONS[precision]}, {order}"
    settings: tuple[tuple[str, Any], ...] = (("precision", precision), ("order", order))
    if padding_free:
        return System(f"{name}, padding free", "trl_trainer", (*settings, ("padding_free", True)))
    return System(name, "trl_trainer", settings)


def trl_settings(workload: Workload, *, every: bool) -> list[System]:
    """Return TRL's default and its faster settings, or its default and the setting that wins where all are compared.

    There are none for a classifier, which SFTTrainer does not train. Packing is not comparable: it redistributes the
    examples over fewer rows, so its updates are not those of the other systems.
    """
    if workload.task != "completion":
        return []
    default = System(
        "TRL, defaults", "trl_trainer", (("defaults", True), ("order", workload.orders[0]))
    )
    last = workload.orders[-1]
    if not every:
        return [default, trl("bfloat16", last)]
    return [default, *(trl(p, last) for p in PRECISIONS), trl("bfloat16", last, padding_free=True)]


def others(workload: Workload) -> list[System]:
    """Return the systems other than lorakit, PEFT and TRL."""
    order = (("order", workload.orders[-1]),)
    return [
        System(f"loralib, {workload.orders[-1]}", "loralib_loop", order),
        System("full fine-tuning, lorakit", "lorakit_train", (("method", "full"),)),
        System(f"full fine-tuning, Trainer, {workload.orders[-1]}", "full_trainer", order),
    ]


def main(*, quick: bool, rows: Sequence[str] = ()) -> None:
    """Measure the given rows, or all."""
    report.say("training: lorakit, PEFT, TRL, loralib and full fine-tuning")
    chosen = [w for w in WORKLOADS if (w.name in rows if rows else w.quick_updates or not quick)]
    record = _earlier(quick) if rows else {}
    with TemporaryDirectory() as scratch:
        large = large_llama(Path(scratch) / "llama-1b") if torch.cuda.is_available() else None
        for workload in chosen:
            workload = workload.on_gpu() if large else workload
            runs = runs_of("training", workload.name, quick)
            base = large if large and workload.task == "completion" else workload.base
            updates = (workload.quick_updates or 2) if quick else workload.updates
            prepared = prepare_once(workload, runs, updates, base)
            record[workload.name] = measure(prepared, runs, quick=quick)
            # Write after each row, so that a failing row does not lose an hour of work.
            report.write("training", record, sections(record), quick)
            report.show(sections({workload.name: record[workload.name]}))


def prepare_once(workload: Workload, runs: Runs, updates: int, base: str = "") -> Prepared:
    """Prepare the examples of a row for `base`, or for its own, unless the cached runs have the same examples.

    Raises:
        RuntimeError: The cached runs have other settings.
    """
    folder = runs.folder / "examples"
    if (folder / "examples.json").exists():
        prepared = Prepared.read(folder)
        if prepared.workload == workload and prepared.updates == updates:
            return prepared
        raise RuntimeError(
            f"The cached runs of '{workload.name}' have other settings. Start again without --resume."
        )
    return prepare(workload, folder, base=base or workload.base, updates=updates)


def measure(prepared: Prepared, runs: Runs, *, quick: bool) -> dict[str, Any]:
    """Run the systems of a row, and return its results."""
    workload = prepared.workload
    rounds = 1 if quick else ROUNDS
    report.say(
        f"\n{workload.name}: {workload.title}; {prepared.source}, {workload.warmup} + {prepared.updates} updates"
    )
    everything = workload.compares_all and not quick
    pefts = peft_settings(workload, every=everything)
    trls = trl_settings(workload, every=everything)
    extra = others(workload) if everything else []
    machine = Machine(prepared)
    figures: dict[str, list[dict[str, Any]]] = {}
    peers = [*pefts, *trls]
    for number in range(rounds):
        systems = [OURS, *peers, *extra]
        # A disturbance with the period of a round then hits other systems each time.
        random.Random(number).shuffle(systems)
        for system in systems:
            command = system.command(prepared.folder, held_out=number == 0)
            run = runs.run(f"{number} {system.name}", *command, sample=machine.sample)
            figures.setdefault(system.name, []).append(run)
            report.say(
                f"  {number + 1}/{rounds}  {system.name:<46} {speed(run):>8,.0f} tokens/s "
                f"{run['process_seconds']:>6.0f} s; machine {run['rate'] / 1e9:,.0f} GFLOP/s, "
                f"{run['bandwidth'] / 1e9:,.0f} GB/s"
            )
        if number == 0:
            peers = list(
                dict.fromkeys([pefts[0], *fastest(pefts, figures), *fastest(trls, figures)])
            )
    best, trl_best = (fastest(settings, figures)[:1] for settings in (pefts, trls))
    shown = dict.fromkeys([OURS, pefts[0], *best, *trls[:1], *trl_best, *extra])
    return {
        "title": workload.title,
        "source": prepared.source,
        "machine": report.machine(),
        "default": pefts[0].name,
        "best": best[0].name,
        "trl_best": [s.name for s in trl_best],
        "sweep": [s.name for s in pefts],
        "trl_sweep": [s.name for s in trls],
        "systems": [s.name for s in shown],
        "left_out": [] if extra else [s.name.split(",")[0] for s in others(workload)],
        "limit": machine.limit(),
        "runs": figures,
    }


def fastest(settings: list[System], figures: dict[str, list[dict[str, Any]]]) -> list[System]:
    """Return the settings that are nearly as fast as the fastest one, that one first; nothing of none.

    A setting with fewer runs than others has lost in the first round.
    """
    most = max((len(figures[s.name]) for s in settings), default=0)
    speeds = {
        s: median(map(speed, figures[s.name])) for s in settings if len(figures[s.name]) == most
    }
    ordered = sorted(speeds, key=speeds.__getitem__, reverse=True)
    return [s for s in ordered if speeds[s] >= NEAR * speeds[ordered[0]]]


class Machine:
    """The operations and bytes that a row needs, and the rates of this machine while the row runs.

    Args:
        prepared: The row.
        dtype: Compute dtype; None is the one that lorakit chooses.
    """

    def __init__(self, prepared: Prepared, dtype: str | None = None) -> None:
        workload = prepared.workload
        order = workload.orders[-1]
        batches = prepared.in_order(order)[workload.warmup :]
        self.shapes = limit.shapes_of(load_model(prepared, "float32"), workload.task)
        self.counts = [limit.counts_of(batch, workload.task) for batch in batches]
        self.dtype = dtype_of_name(dtype or chosen_dtype(prepared))
        self.tokens = prepared.tokens(order)[workload.warmup :]
        self.checkpointing = workload.checkpointing

    def sample(self) -> dict[str, float]:
        """Return the current operations per second, for a batch of median size, and the bytes per second."""
        middle = sorted(self.counts, key=lambda c: c.tokens)[len(self.counts) // 2]
        return {
            "rate": limit.sample_rate(self.shapes, middle, self.dtype),
            "bandwidth": limit.sample_bandwidth(),
        }

    def limit(self) -> dict[str, Any]:
        """Return the operations and bytes of each batch, and the counts that they come from."""
        moved = [
            limit.moved_bytes(self.shapes, c, self.dtype, checkpointing=self.checkpointing)
            for c in self.counts
        ]
        return {
            "dtype": dtype_name(self.dtype),
            "operations": [limit.operations(self.shapes, c) for c in self.counts],
            "bytes": moved,
            "tokens": self.tokens,
            "counts": [asdict(c) for c in self.counts],
        }


def chosen_dtype(prepared: Prepared) -> str:
    """Return the compute dtype that lorakit chooses for the row (`base.dtype: auto`)."""
    config = BaseConfig(name=prepared.base)
    return resolve_dtype(config, batch_size=prepared.workload.batch_size)[0].dtype


def _earlier(quick: bool) -> dict[str, Any]:
    """Return the rows of an earlier run, to keep when only some rows run."""
    path = report.folder(quick) / "training.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
