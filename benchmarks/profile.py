"""Training time by kind of operation: the counted updates of a row under PyTorch's profiler.

    python -m benchmarks profile
    python -m benchmarks.profile FOLDER --result FILE    one row, with its examples in FOLDER

The time of an operation excludes the operations that it calls. The shapes identify a product: the size of the
vocabulary for the head, the rank of the adapter for the low-rank products.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, profile

from benchmarks import report
from benchmarks.examples import Prepared
from benchmarks.runs import process_parser, runs_of, write_result
from benchmarks.systems import load_model, lorakit_train
from benchmarks.training import prepare_once
from benchmarks.workloads import WORKLOADS

ROWS = ("e2e", "e2e-grouped", "instruction", "distinct", "mrpc")

LINEAR, LOW_RANK, HEAD = "linear layers' products", "low-rank products", "head's products"
LOSS, ATTENTION, SOFTMAX = "loss over the vocabulary", "attention's products", "softmax"
COPIES, REST = "copies and casts", "all else, element by element"
KINDS = (LINEAR, ATTENTION, SOFTMAX, HEAD, LOSS, LOW_RANK, COPIES, REST)

_BY_NAME = {
    **dict.fromkeys(("mm", "addmm", "addmm_"), LINEAR),
    **dict.fromkeys(("bmm", "baddbmm"), ATTENTION),
    **dict.fromkeys(("_softmax", "_softmax_backward_data"), SOFTMAX),
    **dict.fromkeys(("copy_", "cat", "index_select", "index_copy_", "index", "clone"), COPIES),
}


def kind(name: str, shapes: Sequence[Any], vocabulary: int, rank: int) -> str:
    """Return the element of :data:`KINDS` for an operation, from its name and the shapes of its inputs."""
    sizes = {size for shape in shapes if isinstance(shape, list | tuple) for size in shape}
    by_name = _BY_NAME.get(name.removeprefix("aten::"), REST)
    if vocabulary in sizes:
        return HEAD if by_name == LINEAR else LOSS
    return LOW_RANK if by_name == LINEAR and rank in sizes else by_name


def measure(prepared: Prepared) -> dict[str, float]:
    """Train on a row, and return the seconds of the counted updates by kind of operation."""
    workload = prepared.workload
    profiler = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
    steps = 0

    def after_step(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == workload.warmup:
            profiler.start()
        elif steps == workload.warmup + prepared.updates:
            profiler.stop()

    hook = register_optimizer_step_post_hook(after_step)
    try:
        with TemporaryDirectory() as scratch:
            lorakit_train.train(prepared, {}, Path(scratch))
    finally:
        hook.remove()
    vocabulary = load_model(prepared, "float32").config.vocab_size
    seconds: Counter[str] = Counter()
    for event in profiler.key_averages(group_by_input_shape=True):
        event_kind = kind(event.key, event.input_shapes, vocabulary, workload.rank)
        seconds[event_kind] += event.self_cpu_time_total / 1e6
    return dict(seconds)


def main(*, quick: bool) -> None:
    """Measure the rows, and write the table."""
    if torch.cuda.is_available():
        report.say("\nprofile: skipped, because it measures CPUs only and this machine has a GPU")
        return
    report.say("\nprofile: training time by kind of operation")
    record: dict[str, Any] = {"machine": report.machine(), "rows": {}}
    for workload in (w for w in WORKLOADS if w.name in ROWS[: 1 if quick else None]):
        runs = runs_of("profile", workload.name, quick)
        prepared = prepare_once(workload, runs, workload.updates)
        run = runs.run("lorakit", "benchmarks.profile", str(prepared.folder))
        record["rows"][workload.name] = {"title": workload.title, "seconds": run["seconds"]}
        report.say(f"  {workload.name}: {sum(run['seconds'].values()):.1f} s")
    report.publish("profile", record, sections(record), quick)


def sections(record: dict[str, Any]) -> Iterator[report.Section]:
    """Yield the table of time fractions, with one row per kind."""
    rows = record["rows"].values()
    table = report.table("fraction of training time", *(row["title"] for row in rows))
    totals = [sum(row["seconds"].values()) for row in rows]
    for name in KINDS:
        shares = [
            row["seconds"].get(name, 0.0) / total for row, total in zip(rows, totals, strict=True)
        ]
        table.add_row(name, *(f"{share:.0%}" for share in shares))
    table.add_row("total seconds", *(f"{total:.1f}" for total in totals))
    yield report.Section("Training time of lorakit by kind of operation", table)


if __name__ == "__main__":
    parser = process_parser(__doc__)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    write_result(args, {"seconds": measure(Prepared.read(args.folder))})
