"""The matrix products of a step, and how long they take on this machine.

A rate for all of them would be wrong by half: how fast a processor multiplies depends on the shapes, on how a library
divides them among threads, and on whether the weights lie in the cache. So those that make up most of a step are tried.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate, cycle
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

SHARE = 0.97
"""Of the time of all products, what those take that are tried: the rest are many and short."""

MOST = 24
"""Products that are tried at most."""

LONGEST = 0.1
"""Seconds of a product that is not tried: it is large enough to go at the rate of a large one."""

COLD_BYTES = 64 * 2**20
"""Operands that take turns, since each layer has weights of its own: more than a core's cache holds."""

LARGEST_BYTES = 256 * 2**20
"""Operands of a product that is tried."""

SECONDS = 0.02
"""Time that each is tried for."""


@dataclass(frozen=True, slots=True)
class Operand:
    """A matrix, or a batch of them, as it lies in memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Operand:
        """Return what `tensor` is."""
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes from its first element to its last."""
        return self._extent * self.dtype.itemsize

    def make(self, device: torch.device) -> Tensor:
        """Return such a tensor. What is in it makes no difference to the time."""
        elements = torch.full((self._extent,), 0.5, dtype=self.dtype, device=device)
        return elements.as_strided(self.shape, self.stride)

    @property
    def _extent(self) -> int:
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))


@dataclass(frozen=True, slots=True)
class Product:
    """A product as an operation of PyTorch computes it."""

    name: str
    """Of the operation: mm, addmm, addmm_, bmm and others."""
    operands: tuple[Operand, ...]
    operations: float
    """Multiplications and additions."""
    moved: int
    """Bytes of the operands and of what comes of them."""


CALLS: dict[str, Callable[..., Any]] = {
    "mm": torch.mm,
    "addmm": torch.addmm,
    "addmm_": Tensor.addmm_,
    "bmm": torch.bmm,
    "baddbmm": torch.baddbmm,
}
"""The operations whose products can be tried."""


def time_products(
    products: Mapping[Product, int], device: torch.device, estimate: Callable[[Product], float]
) -> dict[Product, float]:
    """Return the seconds of the products that make up most of the time, each tried on its own for a moment.

    Args:
        products: How many there are of each.
        device: Where they are computed.
        estimate: Seconds of one, roughly: it decides which are tried.
    """
    rough = {p: estimate(p) * n for p, n in products.items()}
    ranked = sorted(rough, key=lambda p: rough[p], reverse=True)
    before = [0.0, *accumulate(rough[p] for p in ranked)]
    enough = SHARE * before[-1]
    chosen = [p for p, until in zip(ranked, before, strict=False) if until < enough][:MOST]
    return {p: _seconds(p, device) for p in chosen if _tried(p) and estimate(p) <= LONGEST}


def _tried(product: Product) -> bool:
    return product.name in CALLS and _size(product) <= LARGEST_BYTES


def _size(product: Product) -> int:
    return sum(operand.nbytes for operand in product.operands)


def _seconds(product: Product, device: torch.device) -> float:
    turns = max(2, min(16, COLD_BYTES // _size(product)))
    sets = [[operand.make(device) for operand in product.operands] for _ in range(turns)]
    call = CALLS[product.name]
    return timed("call(*next(turns))", SECONDS, call=call, turns=cycle(sets))


def timed(statement: str, seconds: float, **names: Any) -> float:
    """Return the seconds of a statement, the median of what it takes while it is repeated for `seconds`."""
    timer = Timer(statement, globals={**names, "torch": torch}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=seconds).median
