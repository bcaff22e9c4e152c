"""One process with all threads, and several processes that share the threads, on the same steps.

python -m benchmarks processes

Each run is a `torchrun` of its own, and the runs alternate, round after round. Within a run every process records when
it begins a step, when it begins and ends the sum of the gradients, and when the step ends. All processes of a machine
read the same clock, so the time until the last process begins the sum is waiting, and the rest of the sum is sending.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch

import lorakit
from benchmarks import report
from benchmarks.examples import shared_data
from benchmarks.runs import Runs, process_parser, runs_of, write_result
from benchmarks.workloads import SEED
from lorakit.models.base_config import BaseConfig
from lorakit.models.dtype_choice import resolve_dtype
from lorakit.models.dtypes import dtype_name
from lorakit.training.config import OptimizerConfig, TrainConfig
from lorakit.training.distributed import Processes, joined
from lorakit.training.setup import prepare
from lorakit.training.step import optimizer_step

ROUNDS = 3
STEPS, WARM_UP = 16, 4
"""Steps of a run, and how many of them are not counted."""
METHODS = {"LoRA, q and v, r=8": "lora", "full fine-tuning": "full"}


def main(*, quick: bool) -> None:
    """Measure all ways, and write the table."""
    runs = runs_of("processes", "e2e", quick)
    threads = torch.get_num_threads()
    ways = [(1, threads), *((n, threads // n) for n in (2, 4) if threads % n == 0)]
    found: dict[str, dict[str, list[Any]]] = {}
    for number in range(1 if quick else ROUNDS):
        for title, method in METHODS.items():
            for count, own in ways if number % 2 == 0 else reversed(ways):
                name = f"{count} x {own} threads"
                of_method = found.setdefault(title, {})
                of_method.setdefault(name, []).append(_run(runs, method, count, own, number))
    record = {"machine": report.machine(), "runs": found}
    report.publish("processes", record, sections(record), quick)


def _run(runs: Runs, method: str, count: int, threads: int, number: int) -> dict[str, Any]:
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", str(count))
    own = ("-m", "benchmarks.processes", "--method", method, "--threads", str(threads))
    figures = runs.run(f"{method} {count} {number}", *launcher, *own)
    report.say(f"{method}, {count} x {threads}: {figures['tokens_per_second']:.0f} tokens/s")
    return figures


def sections(record: dict[str, Any]) -> list[report.Section]:
    """Return the tables."""
    return [_section(title, ways) for title, ways in record["runs"].items()]


def _section(title: str, ways: dict[str, list[dict[str, Any]]]) -> report.Section:
    table = report.table(
        "processes", "tokens/s", "relative", "computing, s", "waiting", "sending", "update", "sent"
    )
    (first, *_) = ways.values()
    for name, rounds in ways.items():
        pairs = zip(rounds, first, strict=True)
        relative = sorted(r["tokens_per_second"] / f["tokens_per_second"] for r, f in pairs)

        def middle(figure: str, rounds: Sequence[dict[str, Any]] = rounds) -> float:
            return median(r[figure] for r in rounds)

        table.add_row(
            name,
            f"{middle('tokens_per_second'):.0f}",
            f"{median(relative):.2f} ({relative[0]:.2f} to {relative[-1]:.2f})",
            f"{middle('computing'):.3f}",
            *(f"{1000 * middle(part):.1f} ms" for part in ("waiting", "sending", "update")),
            f"{middle('sent') / 1e6:.2f} MB",
        )
    adapter = first[0]["trained_bytes"] / 1e6
    note = (
        f"Medians of {len(first)} rounds of {STEPS - WARM_UP} steps of 16 pairs, in {first[0]['dtype']}; the times are "
        f"those of a step. The trained tensors have {adapter:.2f} MB."
    )
    return report.Section(f"SmolLM2-135M on E2E, {title}", table, note)


# --- one run ----------------------------------------------------------------------------------------


def measure(method: str, threads: int, scratch: Path) -> dict[str, Any] | None:
    """Take the steps in this process and the others; return the figures in the first one."""
    torch.set_num_threads(threads)
    root = shared_data()
    if root is None:
        raise SystemExit("This benchmark needs the data sets: set LORAKIT_SHARED to their folder.")
    config = TrainConfig(
        base=BaseConfig(name="smollm2-135m"),
        data=lorakit.DataConfig(
            train=str(root / "e2e_nlg" / "train.jsonl.gz"),
            columns={"prompt": "meaning_representation", "completion": "human_reference"},
            prompt_template="{prompt}\n",
            max_length=256,
        ),
        output=str(scratch / "run"),
        method=method,
        lora=lorakit.LoRA(rank=8, alpha=16, targets="attention.qv")
        if method == "lora"
        else lorakit.LoRA(),
        batch_size=16,
        seed=SEED,
        optimizer=OptimizerConfig(learning_rate=1e-4),
    )
    with joined("cpu") as processes:
        base, _ = processes.on_first(
            lambda: resolve_dtype(config.base, batch_size=config.batch_size, copies=processes.here)
        )
        job = prepare(dataclasses.replace(config, base=base), processes)
        times, tokens = [], 0
        for number, examples in zip(range(STEPS), job.step_plan.steps(), strict=False):
            began, summing = time.monotonic(), Timed(Processes.sum_gradients)
            with mock.patch.object(Processes, "sum_gradients", summing.method()):
                done = optimizer_step(job, examples, number)
            if number >= WARM_UP:
                times.append((began, summing.began, summing.ended, time.monotonic()))
                tokens += done.tokens
        everyone = processes.gather(times)
    if not processes.is_first:
        return None
    trained = sum(p.numel() * p.element_size() for p in job.parameters.values())
    steps = [_parts(step) for step in zip(*everyone, strict=True)]
    return {
        "tokens_per_second": tokens / sum(step["whole"] for step in steps),
        **{name: median(step[name] for step in steps) for name in steps[0]},
        "trained_bytes": trained,
        # What a ring sends: all parts but one, for the sum and for the result.
        "sent": 2 * (processes.count - 1) * trained // processes.count,
        "dtype": dtype_name(job.dtype),
    }


class Timed:
    """Records when the call of a method began and ended."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self._original = original
        self.began = self.ended = 0.0

    def method(self) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            self.began = time.monotonic()
            found = self._original(*args)
            self.ended = time.monotonic()
            return found

        return timed


def _parts(times: Sequence[tuple[float, float, float, float]]) -> dict[str, float]:
    """Return the seconds of each part of a step, given the times of all processes."""
    began, begin_sum, end_sum, ended = zip(*times, strict=True)
    return {
        "whole": max(ended) - min(began),
        "computing": sum(begin_sum[i] - began[i] for i in range(len(times))) / len(times),
        "waiting": max(begin_sum) - sum(begin_sum) / len(times),
        "sending": max(end_sum) - max(begin_sum),
        "update": max(ended) - max(end_sum),
    }


if __name__ == "__main__":
    parser = process_parser(__doc__)
    parser.add_argument("--method", choices=METHODS.values(), required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        figures = measure(args.method, args.threads, Path(folder))
    if figures is not None:
        write_result(args, figures)
