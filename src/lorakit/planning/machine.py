"""Speed of a machine, and memory of a process beyond its tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from lorakit.models.dtypes import dtype_name
from lorakit.models.float32_products import faster_float32, onednn_is_faster
from lorakit.models.measurements import keep_measurement, measurement_file, read_measurement
from lorakit.ops.dropout import keep_mask
from lorakit.ops.rms_norm import rms_norm
from lorakit.ops.silu_product import silu_product
from lorakit.planning.ledger import Ledger, Work
from lorakit.planning.products import Product, timed
from lorakit.planning.shape import new_mode
from lorakit.training.environment import environment

SOFTWARE = 260 * 10**6
"""Default bytes of what training imports besides torch: transformers, tokenizers, data loading."""

INTERPRETER = 233 * 10**6
"""Bytes of a Python interpreter that has imported torch."""

IMPORTS = 165 * 10**6
"""The part of SOFTWARE that is imported before the base is loaded."""

TOKEN_BYTES = 48
"""Bytes of a token of the data set, whose examples stay in memory: an integer of 32 bytes, and its places in the lists
of tokens and of targets. Measured: 38."""

SLACK, HALF_SLACK = 0.26, 0.22
"""Freed memory between tensors that the C library keeps, as a share of the step's tensors, in float32 and in 16 bits.
Measured: 0.15 to 0.36, more for larger tensors."""

HOLES = 0.15
"""Further freed memory on a CPU, as a share of the step's tensors, if batches differ in size: tensors of one size do
not fit into the holes of another. Measured over hundreds of steps: up to 0.12."""

PACKED, HALF_PACKED = 1.5, 1.0
"""Bytes of the copies that kernels reorder for products, as a multiple of the widest matrix, in float32 and in 16
bits."""

KERNEL = 900_000
"""Bytes per shape of a product that oneDNN caches, in 16 bits and in float32: 580,000, and after thousands of replaced
kernels another 280,000 of holes. MKL, the other library of float32 products, caches nothing."""

UPDATE_BYTES = 40
"""Bytes that the optimizer reads and writes per trained parameter: the gradient for its norm, for clipping and for
AdamW, and the parameter and both running means for AdamW."""

LOCAL_TRAFFIC, GPU_TRAFFIC = 1.2e9, 12e9
"""Bytes per second that a process sends to another: by Gloo within a machine (measured: 0.5 to 1.4 GB), and an
assumption for GPUs on PCI Express."""

CALL_SECONDS = 12e-6
"""Overhead of an operation in PyTorch and Python."""

SECONDS = 0.1
"""Seconds to measure each rate for."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Speed and memory overhead of a machine in one dtype."""

    products: float
    """Floating-point operations per second of a large matrix product."""
    traffic: float
    """Bytes per second that other operations read and write."""
    draws: float
    """Random numbers of dropout per second."""
    sent: float = LOCAL_TRAFFIC
    """Bytes per second that a process sends to another one."""
    call: float = CALL_SECONDS
    """Overhead of an operation in PyTorch and Python, in seconds."""
    software: int | None = None
    """Bytes of the tokenizer, data loading and imported libraries except torch; None means the default. The plan adds
    the examples of the data set."""
    slack: float = HALF_SLACK
    """Freed memory that the allocator keeps, as a share of the step's tensors."""
    packed: float = HALF_PACKED
    """Memory of the copies that products make, as a multiple of the widest matrix."""
    kernel: int = 0
    """Bytes that the CPU library caches for each shape of a product."""
    here: bool = False
    """Whether this is the current machine, which can time the products of a step."""
    origin: str
    """Source of these numbers, as a phrase."""

    def seconds(self, work: Work, timings: Mapping[Product, float] | None = None) -> float:
        """Return the predicted seconds of `work`.

        Args:
            work: Products and other operations.
            timings: Measured seconds of single products (:func:`time_products`); the others are estimated.
        """
        timings = timings or {}
        products = sum(
            n * (timings[p] if p in timings else self.estimate(p)) for p, n in work.products.items()
        )
        other = work.traffic / self.traffic + work.drawn / self.draws + work.calls * self.call
        return products + other

    def estimate(self, product: Product) -> float:
        """Return the estimated seconds of a product, limited by arithmetic or by memory traffic."""
        return max(product.operations / self.products, product.moved / self.traffic)


A100 = Machine(
    products=120e12,
    traffic=1.2e12,
    draws=1e12,  # one kernel draws and applies the mask
    sent=GPU_TRAFFIC,
    call=6e-6,
    software=0,
    slack=0.05,
    packed=0.0,
    origin="device not available: assumes 120 TFLOP/s and 1.2 TB/s, about an A100",
)
"""An assumed GPU. Its overheads hold for any GPU: torch allocates whole blocks, and libraries use no GPU memory."""


def identity(device: torch.device) -> dict[str, Any]:
    """Return the processor, threads and versions that a calibration is valid for."""
    facts = environment(device)
    versions = {name: facts["versions"][name] for name in ("torch", "transformers")}
    return {
        **{name: facts[name] for name in ("processor", "device", "threads")},
        "versions": versions,
        **({"float32": "oneDNN"} if onednn_is_faster() else {}),
    }


def find_machine(device: torch.device, dtype: torch.dtype, *, here: bool) -> Machine:
    """Return the cached calibration of this machine, or measure its rates; an assumed GPU if the device is not here."""
    if not here:
        return A100
    return read_calibration(device, dtype) or measure(device, dtype)


@faster_float32()  # as training does
def measure(device: torch.device, dtype: torch.dtype) -> Machine:
    """Measure matrix products, memory traffic and random numbers for a fraction of a second."""
    rows, width, out = 512, 1024, 4096
    x = torch.randn(rows, width, device=device).to(dtype)
    W = torch.randn(out, width, device=device).to(dtype)
    product = timed("x @ W.T", SECONDS, x=x, W=W)
    gpu = device.type != "cpu"
    call = A100.call if gpu else CALL_SECONDS
    drawn = torch.ones(2**26 if gpu else 2**20, dtype=dtype, device=device)
    # Separate operations apply the mask; they count as traffic.
    draw = timed("draw(drawn, 0.1)", SECONDS, draw=keep_mask, drawn=drawn)
    measured: dict[str, Any] = {
        "products": 2 * rows * width * out / product,
        "traffic": _traffic(device, dtype, call),
        "draws": drawn.numel() / draw,
        "here": True,
        "origin": "measured briefly: products, memory passes, random numbers",
    }
    if gpu:
        return dataclasses.replace(A100, **measured)
    if dtype == torch.float32 and not onednn_is_faster():
        return Machine(**measured, slack=SLACK, packed=PACKED)
    return Machine(**measured, kernel=max(KERNEL, _kernel_bytes(W)))


def _kernel_bytes(W: Tensor) -> int:
    """Return the bytes by which the process grows per shape of a product with `W`, for shapes that are new to it."""
    process, count = psutil.Process(), 16
    x = W.new_ones(8 * count + 1, W.shape[1])
    torch.mm(x[:1], W.T)  # loads the library
    before = process.memory_info().rss
    for n in range(count):
        torch.mm(x[: 8 * n + 9], W.T)  # the result is freed
    return (process.memory_info().rss - before) // count


def _traffic(device: torch.device, dtype: torch.dtype, call: float) -> float:
    """Return the bytes per second of a norm and a gate, forward and backward: a step has no single passes."""
    shape = (1024, 1024) if device.type == "cpu" else (8192, 4096)  # similar to a step

    def tensors() -> list[Tensor]:
        made = [torch.ones(shape, dtype=dtype, device=device) for _ in range(5)]
        return [*(x.requires_grad_() for x in made[:3]), *made[3:]]

    def passes(x: Tensor, gate: Tensor, up: Tensor, norm_grad: Tensor, gate_grad: Tensor) -> None:
        weight = torch.ones(shape[-1], dtype=dtype, device=device)
        normed, gated = rms_norm(x, weight, 1e-6), silu_product(gate, up)
        torch.autograd.grad([normed, gated], [x, gate, up], [norm_grad, gate_grad])

    with new_mode():
        inputs = tensors()
        ledger = Ledger(inputs)
        with ledger:
            passes(*inputs)
    work = ledger.segments[-1].work
    inputs = cycle([tensors() for _ in range(4)])  # exceeds the cache of a core
    seconds = timed("passes(*next(inputs))", SECONDS, passes=passes, inputs=inputs)
    return work.traffic / max(seconds - work.calls * call, 0.1 * seconds)


# --- cached calibrations -------------------------------------------------------------------------------


def calibration_file(device: torch.device, dtype: torch.dtype) -> Path:
    """Return the path of the calibration of this machine and dtype in the user's cache folder."""
    name = dtype_name(dtype)
    return measurement_file(f"machine-{name}", {**identity(device), "dtype": name})


def read_calibration(device: torch.device, dtype: torch.dtype) -> Machine | None:
    """Return the calibration of this machine, or None if none exists or its file is damaged."""
    return read_measurement(calibration_file(device, dtype), Machine)


def keep_calibration(machine: Machine, device: torch.device, dtype: torch.dtype) -> Path:
    """Write a calibration to the user's cache folder.

    Raises:
        LorakitError: The folder is not writable.
    """
    path = calibration_file(device, dtype)
    keep_measurement(path, machine, identity(device))
    return path
