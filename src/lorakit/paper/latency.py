"""Table 1: what a forward pass costs with bottleneck adapters, and with LoRA merged."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lorakit import storage
from lorakit.adapters import attach
from lorakit.adapters.summary import count_parameters
from lorakit.data import DataTask
from lorakit.errors import ConfigurationError
from lorakit.evaluation.base import context_length, open_base
from lorakit.evaluation.mode import evaluating
from lorakit.methods.bottleneck import BottleneckAdapter
from lorakit.methods.lora.config import LoRA
from lorakit.models.blocks import block_outputs
from lorakit.paper.paper_config import PaperConfig
from lorakit.paper.published import published
from lorakit.paper.report import table

MERGED = "LoRA merged"
PASSES = 100
"""Passes behind a number, as in the paper; fewer where a cell has no more time."""
FEWEST_PASSES = 4
CELL_SECONDS = 20.0
"""Time for one setting, all methods together, without a budget."""
SMALL, LARGE = 0.0013, 0.031
"""Adapters' parameters as a share of the base's: 0.5M and 11M of GPT-2 medium's 355M."""
SETTINGS = ((32, 512, SMALL), (16, 256, LARGE), (1, 128, LARGE))
"""Batch, length, and share of parameters of the adapters, a column each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Milliseconds of a forward pass of one method in one setting."""

    method: str
    batch: int
    length: int
    parameters: int
    """Of the adapters; 0 where nothing is added."""
    passes: int
    mean: float
    spread: float
    """Standard deviation over the passes."""


@dataclass(frozen=True, kw_only=True)
class LatencyResult:
    """A table 1 that was measured."""

    timings: tuple[Timing, ...]
    page: Path
    data: Path
    head: list[str]
    rows: list[list[str]]
    """The published rows, then ours."""


def run_latency(config: PaperConfig, say: Callable[[str], None] = print) -> LatencyResult:
    """Time forward passes of a language model bare, with LoRA merged, and with adapters, taking turns.

    Raises:
        LorakitError: The base cannot be read, or is too small for adapters of the paper's share.
        RunFolderError: Another process writes to the folder.
    """
    with storage.lock_folder(config.folder):
        base = open_base(config.base, DataTask(name="completion"))
        seconds = CELL_SECONDS if config.seconds is None else config.seconds / len(SETTINGS)
        context = context_length(base.model) or SETTINGS[0][1]
        timings: list[Timing] = []
        for batch, length, share in SETTINGS:
            length = min(length, context)
            batch = _fitting(base.model, batch, length, seconds)
            say(f"batch {batch}, length {length}")
            timings += _time_setting(base.model, batch, length, share, seconds)
        return _write(config, tuple(timings))


def _fitting(model: PreTrainedModel, batch: int, length: int, seconds: float) -> int:
    """Return the largest halving of `batch` of which some passes of every method fit into the time."""
    with evaluating(model):
        one = torch.zeros((1, length), dtype=torch.long, device=model.device)
        _pass(model, one)
        each = _pass(model, one)
    while batch > 1 and FEWEST_PASSES * 4 * each * batch > seconds:
        batch //= 2
    return batch


def _time_setting(
    model: PreTrainedModel, batch: int, length: int, share: float, seconds: float
) -> list[Timing]:
    size = sum(p.numel() for p in model.parameters())
    adapters = attach(model, LoRA(), name="LoRA")
    methods = {
        "AdapterL": _sized(model, "lin", share * size),
        "AdapterH": _sized(model, "houlsby", share * size),
    }
    for name, method in methods.items():
        attach(model, method, name=name)
    counts = {name: count_parameters(model, method).trainable for name, method in methods.items()}
    generator = torch.Generator().manual_seed(0)
    words = model.config.get_text_config().vocab_size
    ids = torch.randint(words, (batch, length), generator=generator).to(model.device)
    times: dict[str, list[float]] = {name: [] for name in ("FT", MERGED, *methods)}
    try:
        with evaluating(model):
            began = time.monotonic()
            while True:
                for name, found in times.items():
                    _switch(adapters, name)
                    model(ids[:1, :8])  # what a switch prepares is no part of a pass
                    found.append(_pass(model, ids))
                    if name == MERGED:
                        adapters.unmerge()
                done = len(times["FT"])
                # The first round warms caches up and is left out.
                if done > PASSES or (done >= FEWEST_PASSES and time.monotonic() - began > seconds):
                    break
    finally:
        adapters.detach()
    return [
        Timing(
            method=name,
            batch=batch,
            length=length,
            parameters=counts.get(name, 0),
            passes=len(found) - 1,
            mean=1e3 * statistics.fmean(found[1:]),
            spread=1e3 * statistics.stdev(found[1:]),
        )
        for name, found in times.items()
    ]


def _switch(adapters: Any, name: str) -> None:
    if name == MERGED:
        adapters.activate("LoRA")
        adapters.merge("LoRA")
    else:
        adapters.activate(None if name == "FT" else name)


def _pass(model: PreTrainedModel, ids: torch.Tensor) -> float:
    if ids.is_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    model(ids)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _sized(model: PreTrainedModel, kind: Any, parameters: float) -> BottleneckAdapter:
    """Return adapters of about so many parameters."""
    one = count_parameters(model, BottleneckAdapter(kind=kind, size=1)).trainable
    two = count_parameters(model, BottleneckAdapter(kind=kind, size=2)).trainable
    size = max(1, round((parameters - one) / (two - one)) + 1)
    width = min(site.width for site in block_outputs(model))
    if size > width:
        raise ConfigurationError(
            f"Adapters of {parameters / 1e6:.1f}M parameters, the paper's share of the base, would be wider than this "
            "model. Name a larger one with --model."
        )
    return BottleneckAdapter(kind=kind, size=size)


def _write(config: PaperConfig, timings: tuple[Timing, ...]) -> LatencyResult:
    paper = published("table1")
    head = ["model", "method", "parameters", *paper.columns]
    rows = [
        [row.model, row.method, row.setting, *(str(row.cells[name]) for name in paper.columns)]
        for row in paper.rows
    ]
    own = []
    bare = [t for t in timings if t.method == "FT"]
    for name in dict.fromkeys(t.method for t in timings):
        found = [t for t in timings if t.method == name]
        sizes = (
            "none" if not found[0].parameters else ", ".join(_millions(t.parameters) for t in found)
        )
        cells = [
            f"{t.mean:.1f} ± {t.spread:.1f} ({t.mean / b.mean - 1:+.1%}{_smaller(t, asked)})"
            for t, b, asked in zip(found, bare, SETTINGS, strict=True)
        ]
        own.append([config.base.name, name, sizes, *cells])
    page, data = (config.folder / f"table1{suffix}" for suffix in (".md", ".json"))
    bold = [[f"**{cell}**" for cell in row] for row in own]
    notes = "\n".join(f"- {note}" for note in paper.notes)
    passes = ", ".join(str(t.passes) for t in bare)
    text = (
        f"# Table 1 on {config.base.name}\n\n{paper.title}, as published, and in bold of `{config.base.name}`: the "
        f"mean of {passes} passes, ± their standard deviation, and against the bare model. Methods took turns, pass by "
        f"pass, on {_device(config)}.\n\n```console\n$ {config.command}\n```\n\n{table(head, rows + bold)}\n\n"
        f"## Notes\n\n{notes}\n- Adapters have the paper's share of the base's parameters: {SMALL:.2%}, {LARGE:.1%} "
        f"and {LARGE:.1%}. Lengths end at the base's context, and a batch is halved until some passes fit into the "
        "time.\n"
    )
    with storage.atomic_file(page) as temporary:
        temporary.write_text(text, encoding="utf-8")
    record = {
        "table": "table1",
        "model": config.base.name,
        "command": config.command,
        "timings": [{name: getattr(t, name) for name in Timing.__slots__} for t in timings],
    }
    with storage.atomic_file(data) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return LatencyResult(timings=timings, page=page, data=data, head=head, rows=rows + own)


def _smaller(timing: Timing, asked: tuple[int, int, float]) -> str:
    """What differs from the paper's setting, where the time was too short for it."""
    differs = (timing.batch, timing.length) != asked[:2]
    return f", batch {timing.batch}, length {timing.length}" if differs else ""


def _device(config: PaperConfig) -> str:
    device = config.base.pick_device()
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads of the processor"


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f}M"
