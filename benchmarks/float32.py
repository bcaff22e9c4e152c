"""Time of steps in float32 with MKL and with oneDNN, which lorakit trains with on some processors.

Training steps and decode steps of SmolLM2 run in turn with both. A ratio is the median over the steps. Decode steps
show why lorakit decodes with PyTorch's own choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from statistics import median
from typing import Any

import torch

import lorakit
from benchmarks import report
from benchmarks.inference import decode_call
from benchmarks.latency import in_turn, ratio
from lorakit.compute.batching import PACKED_STEP
from lorakit.compute.objective import LanguageModellingLoss
from lorakit.data.packing import pack
from lorakit.models.faster import make_faster
from lorakit.models.float32_products import faster_float32, onednn_is_faster
from lorakit.models.loading import load_base
from lorakit.planning.batches import language_examples

BASE_MODEL = "smollm2-135m"
TEXTS = (4, 16)
"""Texts of a training step, each of 32 tokens."""
DECODING = (1, 4, 10, 32)
"""Sequences of a decode step."""
CONTEXT = 64
STEPS, QUICK_STEPS = 25, 5
LIBRARIES = {"MKL": nullcontext, "oneDNN": faster_float32}


def main(*, quick: bool) -> None:
    """Measure, and write the table."""
    report.say("\nfloat32: products by MKL and by oneDNN")
    if not onednn_is_faster():
        report.say("lorakit computes float32 products with PyTorch's own choice on this processor.")
        return
    seconds = {}
    for name, step in _steps():
        calls = {library: partial(_within, block, step) for library, block in LIBRARIES.items()}
        seconds[name] = in_turn(calls, QUICK_STEPS if quick else STEPS)
    record = {"machine": report.machine(), "seconds": seconds}
    report.publish("float32", record, sections(record), quick)


def sections(record: dict[str, Any]) -> Iterator[report.Section]:
    """Yield the table."""
    table = report.table("SmolLM2-135M in float32", *(f"{name}, ms" for name in LIBRARIES), "ratio")
    for name, times in record["seconds"].items():
        stock, ours = (times[library] for library in LIBRARIES)
        milliseconds = (f"{1000 * median(series):,.0f}" for series in (stock, ours))
        table.add_row(name, *milliseconds, str(ratio(stock, ours)))
    yield report.Section(
        "Float32 products by library",
        table,
        "The ratio is MKL's time to oneDNN's, with its 95 % interval.",
    )


def _within(block: Callable[[], Any], step: Callable[[], object]) -> object:
    with block():
        return step()


def _steps() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the steps by name."""
    base = load_base(BASE_MODEL, dtype="float32").model
    base.requires_grad_(False)
    for rows in DECODING:
        prompts = torch.arange(rows * CONTEXT).view(rows, CONTEXT)
        yield f"decode step, sequences: {rows}", decode_call(base, base.config, prompts)
    lorakit.attach(base, lorakit.LoRA())
    make_faster(base)
    base.train()
    for count in TEXTS:
        batch = pack(language_examples(count, 32, 16), 0, step=PACKED_STEP)
        yield f"training step, texts: {count}", partial(_train, base, batch)


@torch.enable_grad()
def _train(model: Any, batch: dict[str, torch.Tensor]) -> None:
    LanguageModellingLoss(path="fused").loss_sum(model, batch).backward()
