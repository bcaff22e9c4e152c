"""Time the matrix products of a step on this machine.

A single rate for all products is wrong by half: the speed depends on the shapes, on how a library divides them among
threads, and on whether the weights are in the cache. The products that dominate a step are therefore timed.
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
"""Share of the estimated time of all products to time; the rest are many and short."""

MOST = 24
"""Maximum number of products to time."""

LONGEST = 0.1
"""Maximum estimated seconds of a product to time; a longer one runs at the rate of large products."""

COLD_BYTES = 64 * 2**20
"""Bytes of operands to cycle through, more than a core's cache: in a model every layer has different weights."""

LARGEST_BYTES = 256 * 2**20
"""Maximum bytes of the operands of a product to time."""

SECONDS = 0.02
"""Seconds to time each product for."""


@dataclass(frozen=True, slots=True)
class Operand:
    """Layout of a matrix, or of a batch of matrices, in memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Operand:
        """Return the layout of `tensor`."""
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes from its first element to its last."""
        return self._extent * self.dtype.itemsize

    def make(self, device: torch.device) -> Tensor:
        """Return a tensor with this layout. Its values do not affect the time."""
        elements = torch.full((self._extent,), 0.5, dtype=self.dtype, device=device)
        return elements.as_strided(self.shape, self.stride)

    @property
    def _extent(self) -> int:
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix product, or a convolution, as one PyTorch operation."""

    name: str
    """Name of the operation: mm, addmm, addmm_, bmm and others."""
    operands: tuple[Operand, ...]
    operations: float
    """Number of multiplications and additions."""
    moved: int
    """Bytes of the operands and the result."""

    @property
    def operand_bytes(self) -> int:
        """Bytes of the operands."""
        return sum(operand.nbytes for operand in self.operands)


CALLS: dict[str, Callable[..., Any]] = {
    "mm": torch.mm,
    "addmm": torch.addmm,
    "addmm_": Tensor.addmm_,
    "bmm": torch.bmm,
    "baddbmm": torch.baddbmm,
}
"""The operations that can be timed."""


def time_products(
    products: Mapping[Product, int], device: torch.device, estimate: Callable[[Product], float]
) -> dict[Product, float]:
    """Return the seconds of the products that take most of the time, each timed on its own.

    Args:
        products: Number of times that each product is computed.
        device: Device to time them on.
        estimate: Rough seconds of a product, to select the products to time.
    """
    estimates = {p: estimate(p) * n for p, n in products.items()}
    slowest_first = sorted(estimates, key=lambda p: estimates[p], reverse=True)
    before = [0.0, *accumulate(estimates[p] for p in slowest_first)]
    limit = SHARE * before[-1]
    dominant = [p for p, until in zip(slowest_first, before, strict=False) if until < limit]
    return {
        p: _time_product(p, device)
        for p in dominant[:MOST]
        if p.name in CALLS and p.operand_bytes <= LARGEST_BYTES and estimate(p) <= LONGEST
    }


def _time_product(product: Product, device: torch.device) -> float:
    count = max(2, min(16, COLD_BYTES // product.operand_bytes))
    sets = [[operand.make(device) for operand in product.operands] for _ in range(count)]
    call = CALLS[product.name]
    return timed("call(*next(operands))", SECONDS, call=call, operands=cycle(sets))


def timed(statement: str, seconds: float, **names: Any) -> float:
    """Return the median seconds of a statement, repeated for `seconds`. `names` are its variables."""
    timer = Timer(statement, globals={**names, "torch": torch}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=seconds).median
