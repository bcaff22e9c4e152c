"""Table 1: the latency of a forward pass with bottleneck adapters and with merged LoRA."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lorakit import storage
from lorakit.adapters import attach
from lorakit.adapters.summary import count_parameters
from lorakit.compute.base import open_base
from lorakit.compute.batching import context_length
from lorakit.compute.mode import evaluating
from lorakit.data import DataTask
from lorakit.errors import ConfigurationError
from lorakit.methods.bottleneck import BottleneckAdapter
from lorakit.methods.lora.method import LoRA
from lorakit.methods.method import Method
from lorakit.models.blocks import block_outputs
from lorakit.models.devices import pick_device
from lorakit.paper.paper_config import PaperConfig
from lorakit.paper.published import published
from lorakit.paper.report import table, write
from lorakit.paper.runs import Say

MERGED = "LoRA merged"
PASSES = 100
"""Passes per number, as in the paper; fewer if the time for a setting runs out."""
FEWEST_PASSES = 4
SETTING_SECONDS = 20.0
"""Time for all methods in one setting, without a budget."""
SMALL, LARGE = 0.0013, 0.031
"""Adapter parameters as a share of the base's: 0.5M and 11M of GPT-2 medium's 355M."""
SETTINGS = ((32, 512, SMALL), (16, 256, LARGE), (1, 128, LARGE))
"""Batch size, length and parameter share of the adapters, one tuple per column."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Latency of a forward pass of one method in one setting."""

    method: str
    batch: int
    length: int
    parameters: int
    """Parameters of the adapters; 0 without adapters."""
    passes: int
    mean: float
    """In milliseconds."""
    spread: float
    """Standard deviation over the passes, in milliseconds."""


@dataclass(frozen=True, kw_only=True)
class LatencyResult:
    """A measured table 1, and the files that hold it."""

    timings: tuple[Timing, ...]
    page: Path
    data: Path
    head: list[str]
    published: list[list[str]]
    measured: list[list[str]]


def run_latency(config: PaperConfig, say: Say = print) -> LatencyResult:
    """Time interleaved forward passes of a language model: without adapters, with merged LoRA, with adapters.

    Raises:
        LorakitError: The base cannot be read, or is too small for adapters with the paper's share of parameters.
        RunFolderError: Another process writes to the folder.
    """
    with storage.lock_folder(config.folder):
        base = open_base(config.base, DataTask(name="completion"))
        seconds = SETTING_SECONDS if config.seconds is None else config.seconds / len(SETTINGS)
        context = context_length(base.model) or SETTINGS[0][1]
        timings: list[Timing] = []
        for batch, length, share in SETTINGS:
            length = min(length, context)
            batch = _largest_batch(base.model, batch, length, seconds)
            say(f"batch {batch}, length {length}")
            timings += _time_setting(base.model, batch, length, share, seconds)
        return _write(config, tuple(timings))


def _largest_batch(model: PreTrainedModel, batch: int, length: int, seconds: float) -> int:
    """Halve `batch` until the fewest passes of all four methods, and one for warm-up, fit into the time."""
    with evaluating(model):
        row = torch.zeros((1, length), dtype=torch.long, device=model.device)
        _time_pass(model, row)
        row_seconds = _time_pass(model, row)
    while batch > 1 and (FEWEST_PASSES + 1) * 4 * row_seconds * batch > seconds:
        batch //= 2
    return batch


def _time_setting(
    model: PreTrainedModel, batch: int, length: int, share: float, seconds: float
) -> list[Timing]:
    parameters = share * sum(p.numel() for p in model.parameters())
    adapters = {
        "AdapterL": _bottleneck_of(model, "lin", parameters),
        "AdapterH": _bottleneck_of(model, "houlsby", parameters),
    }
    counts = {name: count_parameters(model, method).trainable for name, method in adapters.items()}
    generator = torch.Generator().manual_seed(0)
    vocab_size = model.config.get_text_config().vocab_size
    ids = torch.randint(vocab_size, (batch, length), generator=generator).to(model.device)
    methods: dict[str, Method | None] = {"FT": None, MERGED: LoRA(), **adapters}
    times: dict[str, list[float]] = {name: [] for name in methods}
    start = time.monotonic()
    while True:
        for name, method in methods.items():
            with adapted(model, method):
                model(ids[:1, :8])  # run one-time work after the switch outside the timing
                times[name].append(_time_pass(model, ids))
        rounds = len(times["FT"])
        # The first round warms up caches and is excluded.
        if rounds > PASSES or (rounds > FEWEST_PASSES and time.monotonic() - start > seconds):
            break
    return [
        Timing(
            method=name,
            batch=batch,
            length=length,
            parameters=counts.get(name, 0),
            passes=len(method_times) - 1,
            mean=1e3 * statistics.fmean(method_times[1:]),
            spread=1e3 * statistics.stdev(method_times[1:]),
        )
        for name, method_times in times.items()
    ]


@contextmanager
def adapted(model: PreTrainedModel, method: Method | None) -> Iterator[None]:
    """Attach a method and evaluate the model while the block runs, with LoRA merged; None leaves the model bare.

    Nothing else may be attached: the hook of an adapted layer costs time also where its adapter is not active.
    """
    with ExitStack() as stack:
        if method is not None:
            # In the base's dtype, as adapters are served: float32 masters would be cast in every pass.
            handle = attach(model, method, dtype=model.dtype)
            stack.callback(handle.detach)
            if isinstance(method, LoRA):
                handle.merge()
        stack.enter_context(evaluating(model))
        yield


def _time_pass(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Return the seconds of a forward pass."""
    if ids.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    model(ids)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _bottleneck_of(model: PreTrainedModel, kind: Any, parameters: float) -> BottleneckAdapter:
    """Return bottleneck adapters with about this many parameters in total."""
    one = count_parameters(model, BottleneckAdapter(kind=kind, size=1)).trainable
    two = count_parameters(model, BottleneckAdapter(kind=kind, size=2)).trainable
    size = max(1, round((parameters - one) / (two - one)) + 1)
    width = min(site.width for site in block_outputs(model))
    if size > width:
        raise ConfigurationError(
            f"Adapters with {parameters / 1e6:.1f}M parameters, the paper's share of the base, would be wider than "
            f"this model: bottleneck {size}, hidden size {width}. Choose a larger model with --base.name."
        )
    return BottleneckAdapter(kind=kind, size=size)


def _write(config: PaperConfig, timings: tuple[Timing, ...]) -> LatencyResult:
    paper = published("table1")
    head = ["model", "method", "parameters", *paper.columns]
    rows = [
        [row.model, row.method, row.setting, *(str(row.cells[name]) for name in paper.columns)]
        for row in paper.rows
    ]
    measured = []
    bare = [t for t in timings if t.method == "FT"]
    for name in dict.fromkeys(t.method for t in timings):
        method_timings = [t for t in timings if t.method == name]
        sizes = ", ".join(f"{t.parameters / 1e6:.2f}M" for t in method_timings if t.parameters)
        cells = [
            f"{t.mean:.1f} ± {t.spread:.1f} ({t.mean / b.mean - 1:+.1%}{_reduced(t, setting)})"
            for t, b, setting in zip(method_timings, bare, SETTINGS, strict=True)
        ]
        measured.append([config.base.name, name, sizes or "none", *cells])
    notes = "\n".join(f"- {note}" for note in paper.notes)
    passes = ", ".join(str(t.passes) for t in bare)
    text = (
        f"# Table 1 on {config.base.name}\n\n{paper.title}, as published. The rows in bold are measured on "
        f"`{config.base.name}`: mean of {passes} passes ± standard deviation, and the difference from the model "
        f"without adapters. The passes of the methods are interleaved, on {_device(config)}.\n\n"
        f"```console\n$ {config.command}\n```\n\n{table(head, rows, measured)}\n\n"
        f"## Notes\n\n{notes}\n- Adapters have the paper's share of the base's parameters: {SMALL:.2%}, {LARGE:.1%} "
        f"and {LARGE:.1%}. The length is at most the base's context. The batch is halved until at least "
        f"{FEWEST_PASSES} passes of each method fit into the time.\n"
    )
    record = {
        "table": "table1",
        "model": config.base.name,
        "command": config.command,
        "timings": [asdict(t) for t in timings],
    }
    page, data = write(config, text, record)
    return LatencyResult(
        timings=timings, page=page, data=data, head=head, published=rows, measured=measured
    )


def _reduced(timing: Timing, setting: tuple[int, int, float]) -> str:
    """Return the batch and length if they are smaller than the paper's, else an empty string."""
    if (timing.batch, timing.length) == setting[:2]:
        return ""
    return f", batch {timing.batch}, length {timing.length}"


def _device(config: PaperConfig) -> str:
    device = pick_device(config.base.device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads"
