"""How fast a machine computes, and what a process needs beyond its tensors."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit import storage
from lorakit.errors import BaseModelError, LorakitError
from lorakit.models.dtypes import dtype_name
from lorakit.models.gguf import cache_folder
from lorakit.ops import dropout, rms_norm, silu_product
from lorakit.ops.dropout import kept
from lorakit.planning.ledger import Ledger, Work
from lorakit.planning.products import Product, timed
from lorakit.planning.shape import new_mode
from lorakit.training.environment import environment

SOFTWARE = 260 * 10**6
"""Bytes of what training imports beside torch (transformers, tokenizers, reading data), where not measured."""

INTERPRETER = 233 * 10**6
"""Bytes of an interpreter with torch imported."""

IMPORTS = 165 * 10**6
"""Of those of SOFTWARE, what is there before a base is loaded."""

SLACK = {torch.float32: 0.26}
"""Freed memory between tensors that the C library keeps, as a share of the step's tensors: more where they are
large. 0.15 to 0.36 were seen."""

HALF_SLACK = 0.22
"""The same in bfloat16 and float16."""

PACKED = {torch.float32: 1.5}
"""Copies that products make of the widest matrix, in the order their kernel reads."""

HALF_PACKED = 1.0
"""The same in bfloat16 and float16."""

GPU_SLACK = 0.05
"""The same of torch's allocator on a GPU, which gives out whole blocks."""

UPDATE_BYTES = 40
"""Bytes that the optimizer reads and writes for a trained parameter: its gradient for the norm, again where that is
clipped, and again, with the parameter and both means, for AdamW."""

CALL_SECONDS = 12e-6
"""Seconds that an operation takes beside its work: PyTorch's and Python's."""

SECONDS = 0.1
"""Time that each of the rates is measured for."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a prediction needs to know of the machine, in one dtype."""

    products: float
    """Floating-point operations a second of a matrix product that is large."""
    traffic: float
    """Bytes that other operations read and write a second."""
    draws: float
    """Random decisions of dropout a second."""
    call: float = CALL_SECONDS
    """Seconds that an operation takes beside its work: PyTorch's and Python's."""
    software: int | None = None
    """Bytes of imported libraries beyond torch, tokenizer and data; None where it was not measured."""
    slack: float = HALF_SLACK
    """Memory that the allocator holds beyond tensors, as a share of those of a step."""
    packed: float = HALF_PACKED
    """Memory that products hold beyond tensors, as a multiple of the widest matrix."""
    here: bool = False
    """Whether it is this one, on which a step's products can be tried."""
    origin: str
    """Where these come from, in words."""

    def seconds(self, work: Work, tried: Mapping[Product, float] | None = None) -> float:
        """Return how long work takes.

        Args:
            work: What there is to do.
            tried: Seconds of single products, as far as they were measured (:func:`time_products`).
        """
        beside = work.traffic / self.traffic + work.drawn / self.draws + work.calls * self.call
        return self.seconds_of_products(work, tried) + beside

    def seconds_of_products(
        self, work: Work, tried: Mapping[Product, float] | None = None
    ) -> float:
        """Return how long the products of `work` take."""
        tried = tried or {}
        return sum(
            n * (tried[p] if p in tried else self.estimate(p)) for p, n in work.products.items()
        )

    def estimate(self, product: Product) -> float:
        """Return how long a product takes that was not tried: it multiplies or it reads, whichever is longer."""
        return max(product.operations / self.products, product.moved / self.traffic)


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
        return Machine(
            products=120e12,
            traffic=1.2e12,
            draws=3e11,
            call=6e-6,
            software=0,
            slack=GPU_SLACK,
            packed=0.0,
            origin="no such device here: 120 TFLOP/s and 1.2 TB/s are assumed, about those of an A100",
        )
    return read_calibration(device, dtype) or measure(device, dtype)


def measure(device: torch.device, dtype: torch.dtype) -> Machine:
    """Measure products, memory traffic and random numbers for a fraction of a second."""
    rows, width, out = 512, 1024, 4096
    x = torch.randn(rows, width, device=device).to(dtype)
    W = torch.randn(out, width, device=device).to(dtype)
    product = timed("x @ W.T", SECONDS, x=x, W=W)
    gpu = device.type != "cpu"
    call = 6e-6 if gpu else CALL_SECONDS
    drawn = torch.ones(2**26 if gpu else 2**20, dtype=dtype, device=device)
    # On a CPU the passes that apply what was drawn are operations of their own.
    draw = timed("draw(drawn, 0.1)", SECONDS, draw=dropout if gpu else kept, drawn=drawn)
    return Machine(
        products=2 * rows * width * out / product,
        traffic=_traffic(device, dtype, call),
        draws=drawn.numel() / draw,
        call=call,
        software=0 if gpu else None,
        slack=GPU_SLACK if gpu else SLACK.get(dtype, HALF_SLACK),
        packed=0.0 if gpu else PACKED.get(dtype, HALF_PACKED),
        here=True,
        origin="measured for a moment: products, passes over memory, random numbers",
    )


def _traffic(device: torch.device, dtype: torch.dtype, call: float) -> float:
    """Bytes a second of a norm and a gate, there and back: single passes are faster, and a step has none."""
    shape = (1024, 1024) if device.type == "cpu" else (8192, 4096)  # about those of a step

    def tensors() -> list[Tensor]:
        made = [torch.ones(shape, dtype=dtype, device=device) for _ in range(5)]
        return [*(x.requires_grad_() for x in made[:3]), *made[3:]]

    def passes(x: Tensor, gate: Tensor, up: Tensor, of_norm: Tensor, of_gate: Tensor) -> None:
        weight = torch.ones(shape[-1], dtype=dtype, device=device)
        normed, gated = rms_norm(x, weight, 1e-6), silu_product(gate, up)
        torch.autograd.grad([normed, gated], [x, gate, up], [of_norm, of_gate])

    with new_mode():
        given = tensors()
        ledger = Ledger(given)
        with ledger:
            passes(*given)
    work = ledger.segments[-1].work
    turns = cycle([tensors() for _ in range(4)])  # more than a core's cache holds
    seconds = timed("passes(*next(turns))", SECONDS, passes=passes, turns=turns)
    return work.traffic / max(seconds - work.calls * call, 0.1 * seconds)


# --- calibrations that are kept -----------------------------------------------------------------------


def calibration_file(device: torch.device, dtype: torch.dtype) -> Path:
    """Return where the calibration of this machine and dtype is kept, in the user's cache folder."""
    name = dtype_name(dtype)
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
