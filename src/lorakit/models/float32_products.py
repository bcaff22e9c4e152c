"""Train in float32 on a CPU with oneDNN's products where they are faster than MKL's and as precise."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from lorakit.models.processor import processor_name

PRECISION = 1e-5
"""Largest relative error of a float32 product. With operands rounded to bfloat16 it is 2e-3."""

_STOCK, _ONEDNN = "none", "bf16"

_lock = threading.Lock()
_open = 0
"""Number of open blocks in this process."""
_before = _STOCK
"""The setting before the first of them."""


@contextmanager
def faster_float32() -> Iterator[None]:
    """Compute float32 products with oneDNN inside the block, if this processor gains from it.

    PyTorch multiplies float32 matrices with MKL, which uses its AVX-512 kernels on Intel's processors only. oneDNN uses
    its own on every processor that has these instructions. PyTorch calls it for float32 only if it may round the
    operands to bfloat16. It makes use of that on processors with matrix units alone, but a product is compared first.

    This is for training. Decoding multiplies so little in each of torch's attention products that oneDNN is slower.

    The setting belongs to the process: the first of several open blocks changes it and the last one resets it. A
    choice of the user's stays.
    """
    if not onednn_is_faster():
        yield
        return
    _count(1)
    try:
        yield
    finally:
        _count(-1)


def _count(blocks: int) -> None:
    """Open a block, or close one."""
    global _open, _before
    with _lock:
        if not _open:
            _before = _setting()
        _open += blocks
        if _before == _STOCK:
            _set(_ONEDNN if _open else _STOCK)


@functools.cache
def onednn_is_faster() -> bool:
    """Return whether `faster_float32` uses oneDNN: it is faster than MKL on this processor, and as precise."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or "Intel" in processor_name():
        return False
    if not hasattr(torch.backends.mkldnn, "matmul"):  # before torch 2.9
        return False
    x, W = (torch.arange(rows * 512.0).sin().view(rows, 512) for rows in (96, 80))
    before = _setting()
    _set(_ONEDNN)
    product = _product(x, W)
    _set(before)
    exact = x.double() @ W.double().T
    return bool((product - exact).norm() <= PRECISION * exact.norm())


def _product(x: Tensor, W: Tensor) -> Tensor:
    return F.linear(x, W)


def _setting() -> str:
    return torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]


def _set(precision: str) -> None:
    torch.backends.mkldnn.matmul.fp32_precision = precision  # type: ignore[attr-defined]
