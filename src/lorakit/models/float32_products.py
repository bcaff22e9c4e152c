"""Train in float32 on a CPU with oneDNN's products where they are faster than MKL's and as precise."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from lorakit.models.processor import limit_kernels, processor_name
from lorakit.models.shared_setting import SharedSetting

PRECISION = 1e-5
"""Largest relative error of a float32 product. With operands rounded to bfloat16 it is 2e-3."""

_STOCK, _ONEDNN = "none", "bf16"


@contextmanager
def faster_float32() -> Iterator[None]:
    """Compute float32 products with oneDNN inside the block, if this processor gains from it.

    PyTorch multiplies float32 matrices with MKL, which uses its AVX-512 kernels on Intel's processors only. oneDNN uses
    its own on every processor that has these instructions. PyTorch uses oneDNN for float32 only under a setting that
    permits it to round the operands to bfloat16. oneDNN rounds on processors with matrix units only; a trial product
    checks that it does not round here.

    This is for training. Decoding of many sequences is slower: torch's attention multiplies many small matrices.

    The setting belongs to the process: the first of several open blocks changes it and the last one resets it. A
    choice of the user's stays, and so does one that is made inside a block.
    """
    with _PRECISION.changed() if onednn_is_faster() else nullcontext():
        yield


def _use_onednn() -> Callable[[], None]:
    is_ours = _setting() == _STOCK
    if is_ours:
        _set(_ONEDNN)

    def restore() -> None:
        if is_ours and _setting() == _ONEDNN:
            _set(_STOCK)

    return restore


_PRECISION = SharedSetting(_use_onednn)


@functools.cache
def onednn_is_faster() -> bool:
    """Return whether `faster_float32` uses oneDNN: AVX-512, no processor of Intel's, and a product as precise."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or "Intel" in processor_name():
        return False
    if not hasattr(torch.backends.mkldnn, "matmul"):  # before torch 2.9
        return False
    limit_kernels()  # the library reads its limits at its first product
    x, W = (torch.arange(rows * 512.0).sin().view(rows, 512) for rows in (96, 80))
    with _PRECISION.lock:
        before = _setting()
        _set(_ONEDNN)
        try:
            product = _product(x, W)
        finally:
            _set(before)
    exact = x.double() @ W.double().T
    return bool((product - exact).norm() <= PRECISION * exact.norm())


def _product(x: Tensor, W: Tensor) -> Tensor:
    return F.linear(x, W)


def _setting() -> str:
    return torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]


def _set(precision: str) -> None:
    torch.backends.mkldnn.matmul.fp32_precision = precision  # type: ignore[attr-defined]
