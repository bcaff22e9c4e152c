"""Time the matrix products of a step on this machine.

A single rate for all products is wrong by half: the speed depends on the shapes, on how a library divides them among
threads, and on whether the weights are in the cache. The products that dominate a step are therefore timed.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate, cycle
from typing import Any

import torch
from torch import Tensor

from lorakit.models.float32_products import faster_float32

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
"""Seconds to time each product for. A longer one is timed with fewer rows, and its time is extrapolated."""

MIN_ROWS = 256
"""Minimum rows of such a product: enough to read its weights at little cost."""

LIMIT = 1.0
"""Seconds to time all products for; those left over run at the rate of large products."""


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

    @property
    def rows(self) -> int:
        """Rows of the result, or matrices of a batch."""
        return self.operands[-2].shape[0]

    def with_rows(self, rows: int) -> tuple[Operand, ...]:
        """Return the operands of the first `rows` rows of the result."""
        *left, right = self.operands
        cut = [
            dataclasses.replace(operand, shape=(rows, *operand.shape[1:]))
            if len(operand.shape) == 2  # a bias has one dimension
            else operand
            for operand in left
        ]
        return (*cut, right)


CALLS: dict[str, Callable[..., Any]] = {
    "mm": torch.mm,
    "addmm": torch.addmm,
    "addmm_": Tensor.addmm_,
    "bmm": torch.bmm,
    "baddbmm": torch.baddbmm,
}
"""The operations that can be timed."""


@dataclass(frozen=True)
class Timings:
    """Measured times of products."""

    seconds: dict[Product, float]
    extrapolated: bool = False
    """Whether some products were timed with fewer rows."""
    skipped: int = 0
    """Number of products that the time limit left over."""

    @property
    def note(self) -> str:
        """What was not measured in full, as a phrase; "" for nothing."""
        parts = []
        if self.extrapolated:
            parts.append("long products with fewer rows, extrapolated")
        if self.skipped:
            count = self.skipped + len(self.seconds)
            parts.append(f"{self.skipped} of {count} products not timed, to save time")
        return "; ".join(parts)


@faster_float32()  # as training does
def time_products(
    steps: Iterable[Mapping[Product, int]],
    device: torch.device,
    estimate: Callable[[Product], float],
) -> Timings:
    """Time the products that take most of the time of a step, each on its own.

    Args:
        steps: For each step, the number of times that it computes each product.
        device: Device to time them on.
        estimate: Rough seconds of a product, to select the products to time.
    """
    selected = {p: _rows(p, estimate(p)) for counts in steps for p in _dominant(counts, estimate)}
    seconds: dict[Product, float] = {}
    began = time.perf_counter()
    for product, rows in selected.items():
        if time.perf_counter() - began > LIMIT:
            break
        seconds[product] = _time_product(product, rows, device)
    return Timings(
        seconds,
        extrapolated=any(selected[p] < p.rows for p in seconds),
        skipped=len(selected) - len(seconds),
    )


def _dominant(
    products: Mapping[Product, int], estimate: Callable[[Product], float]
) -> list[Product]:
    """Return the products to time, those that take most of a step first."""
    estimates = {p: estimate(p) * n for p, n in products.items()}
    slowest_first = sorted(estimates, key=lambda p: estimates[p], reverse=True)
    before = [0.0, *accumulate(estimates[p] for p in slowest_first)]
    limit = SHARE * before[-1]
    dominant = [p for p, until in zip(slowest_first, before, strict=False) if until < limit]
    return [
        p
        for p in dominant[:MOST]
        if p.name in CALLS and p.operand_bytes <= LARGEST_BYTES and estimate(p) <= LONGEST
    ]


def _rows(product: Product, estimate: float) -> int:
    """Return the number of rows to time: all, or as many as take about `SECONDS`."""
    if len(product.operands[-1].shape) > 2:  # fewer matrices would stay in the cache
        return product.rows
    return min(product.rows, max(MIN_ROWS, int(product.rows * SECONDS / estimate)))


def _time_product(product: Product, rows: int, device: torch.device) -> float:
    """Return the seconds of a product, extrapolated from its first `rows` rows."""
    operands = product.with_rows(rows) if rows < product.rows else product.operands
    count = max(2, min(16, COLD_BYTES // sum(operand.nbytes for operand in operands)))
    sets = [[operand.make(device) for operand in operands] for _ in range(count)]
    call = CALLS[product.name]
    seconds = timed("call(*next(operands))", SECONDS, call=call, operands=cycle(sets))
    return seconds * product.rows / rows


def timed(statement: str, seconds: float, **names: Any) -> float:
    """Return the median seconds of a statement, repeated for `seconds`. `names` are its variables."""
    from torch.utils.benchmark import Timer  # imports setuptools

    timer = Timer(statement, globals={**names, "torch": torch}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=seconds).median
