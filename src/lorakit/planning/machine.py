"""How fast a machine computes, and what a process needs beyond its tensors."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer

from lorakit import storage
from lorakit.errors import BaseModelError, LorakitError
from lorakit.models.gguf import cache_folder
from lorakit.planning.ledger import Work
from lorakit.training.environment import environment

SOFTWARE = 260 * 10**6
"""Bytes of what training imports beside torch (transformers, tokenizers, reading data), where not measured."""

INTERPRETER = 233 * 10**6
"""Bytes of an interpreter with torch imported."""

IMPORTS = 165 * 10**6
"""Of those of SOFTWARE, what is there before a base is loaded."""

SLACK = {torch.float32: 0.32}
"""Freed memory between tensors that the C library keeps, as a share of the step's tensors: more where they are
large. 0.15 to 0.36 were seen."""

HALF_SLACK = 0.22
"""The same in bfloat16 and float16."""

PACKED = {torch.float32: 1.5}
"""Copies that products make of the widest matrix, in the order their kernel reads."""

HALF_PACKED = 0.5
"""The same in bfloat16 and float16."""

GPU_SLACK = 0.05
"""The same of torch's allocator on a GPU, which gives out whole blocks."""

CALL_SECONDS = 12e-6
"""Seconds of an operation on nothing."""

SECONDS = 0.15
"""Time that each of the rates is measured for."""

ASSUMED_GPU = {"products": 120e12, "traffic": 1.2e12}
"""Operations and bytes a second of a GPU that is not here: of the order of an A100's in bfloat16."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a prediction needs to know of the machine, in one dtype."""

    products: float
    """Floating-point operations of matrix products a second."""
    traffic: float
    """Bytes that other operations read and write a second."""
    call: float = CALL_SECONDS
    """Seconds of an operation on nothing."""
    software: int | None = None
    """Bytes of imported libraries beyond torch, tokenizer and data; None where it was not measured."""
    slack: float = HALF_SLACK
    """Memory that the allocator holds beyond tensors, as a share of those of a step."""
    packed: float = HALF_PACKED
    """Memory that products hold beyond tensors, as a multiple of the widest matrix."""
    origin: str
    """Where these come from, in words."""

    def seconds(self, work: Work) -> float:
        """Return how long work takes."""
        return work.products / self.products + work.traffic / self.traffic + work.calls * self.call


def identity(device: torch.device) -> dict[str, Any]:
    """Return what a calibration holds for: the processor, its threads, the versions that compute."""
    found = environment(device)
    kept = ("processor", "device", "threads")
    versions = {name: found["versions"][name] for name in ("torch", "transformers")}
    return {**{name: found[name] for name in kept}, "versions": versions}


def find_machine(device: torch.device, dtype: torch.dtype, *, here: bool) -> Machine:
    """Return this machine's calibration, else what a short measurement tells.

    Args:
        device: Where the run computes.
        dtype: What it computes in.
        here: Whether that device is on this machine; without it, the figures are assumed.
    """
    if not here:
        assumed = (
            "no such device here: 120 TFLOP/s and 1.2 TB/s are assumed, about those of an A100"
        )
        return Machine(
            **ASSUMED_GPU, call=6e-6, software=0, slack=GPU_SLACK, packed=0.0, origin=assumed
        )
    kept = read_calibration(device, dtype)
    if kept is not None:
        return kept
    return measure(device, dtype)


def measure(device: torch.device, dtype: torch.dtype) -> Machine:
    """Measure products and memory traffic for a fraction of a second."""
    rows, width, out = 512, 1024, 4096
    x = torch.randn(rows, width, device=device).to(dtype)
    W = torch.randn(out, width, device=device).to(dtype)
    product = _seconds("x @ W.T", x=x, W=W)
    y = torch.ones(2**24, dtype=dtype, device=device)  # more than a cache holds
    copy = _seconds("torch.mul(y, 2, out=z)", y=y, z=torch.empty_like(y))
    gpu = device.type != "cpu"
    return Machine(
        products=2 * rows * width * out / product,
        traffic=2 * y.numel() * y.element_size() / copy,
        call=6e-6 if gpu else CALL_SECONDS,
        software=0 if gpu else None,
        slack=GPU_SLACK if gpu else SLACK.get(dtype, HALF_SLACK),
        packed=0.0 if gpu else PACKED.get(dtype, HALF_PACKED),
        origin=f"products and memory traffic measured for {2 * SECONDS:g} s",
    )


def _seconds(statement: str, **tensors: Any) -> float:
    names = {**tensors, "torch": torch}
    timer = Timer(statement, globals=names, num_threads=torch.get_num_threads())
    # Whatever else the machine does makes a sample slower, never faster.
    return min(timer.blocked_autorange(min_run_time=SECONDS).times)


# --- calibrations that are kept -----------------------------------------------------------------------


def calibration_file(device: torch.device, dtype: torch.dtype) -> Path:
    """Return where the calibration of this machine and dtype is kept, in the user's cache folder."""
    name = str(dtype).removeprefix("torch.")
    found = json.dumps({**identity(device), "dtype": name}, sort_keys=True)
    return cache_folder() / f"machine-{name}-{hashlib.sha256(found.encode()).hexdigest()[:16]}.json"


def read_calibration(device: torch.device, dtype: torch.dtype) -> Machine | None:
    """Return what was calibrated on this very machine, None where nothing was, or its file is damaged."""
    path = calibration_file(device, dtype)
    if not path.exists():
        return None
    try:
        return Machine(**storage.read_record(path, BaseModelError)["machine"])
    except (LorakitError, KeyError, TypeError):  # a cache: what cannot be read is measured anew
        return None


def keep_calibration(machine: Machine, device: torch.device, dtype: torch.dtype) -> Path:
    """Write a calibration into the user's cache folder.

    Raises:
        LorakitError: The folder cannot be written.
    """
    path = calibration_file(device, dtype)
    with storage.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with storage.atomic_file(path) as temporary:
            record = {"machine": dataclasses.asdict(machine), "identity": identity(device)}
            storage.write_record(temporary, record)
    return path
