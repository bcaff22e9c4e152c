"""Dropout with a fast random number generator on the CPU."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.ops.derivatives import Function, apply, is_transformed

PERIOD = 2**10
"""Elements after which the pattern of thresholds repeats."""

STEPS = 2**8 * PERIOD
"""Resolution of the probability: it is rounded to a multiple of 1 / 262,144."""


def dropout(x: Tensor, p: float) -> Tensor:
    """Return `x` with each element set to zero with probability `p`, the others divided by ``1 - p``.

    On a CPU the random bits come from a small fast generator (SFC64). A draw from torch's default generator seeds
    it, so the result depends only on torch's seed or restored state. On other devices, under torch.compile
    and under torch.func this is `torch.nn.functional.dropout`.

    Drawing random bits dominates the cost, so each element uses eight bits and compares them with a threshold. If
    256 p is not an integer, a pattern of two neighbouring thresholds averages to p. The pattern starts at a random
    offset, so that each element is dropped with the same probability.

    Args:
        x: Any shape.
        p: Between 0 and 1, rounded to a multiple of 1 / 262,144. The scale factor uses the rounded value.
    """
    if not fast(x) or is_transformed(x) or not 0 < p < 1:
        return F.dropout(x, p)
    return apply(_Dropout, x, p)


def fast(x: Tensor) -> bool:
    """Return whether the fast generator supports `x`."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def kept(x: Tensor, p: float) -> tuple[Tensor, float]:
    """Draw a bool tensor on the CPU that marks the elements of `x` to keep, and return it with their factor."""
    dropped = max(round(p * STEPS), 1)
    factor = STEPS / max(STEPS - dropped, 1)
    if isinstance(x, torch._subclasses.FakeTensor):  # planning traces a step without data
        return torch.empty(x.shape, dtype=torch.bool).bernoulli_(), factor
    if p > 255 / 256:  # exceeds the highest threshold of eight bits
        return torch.rand(x.shape, dtype=torch.float64, device=x.device) >= dropped / STEPS, factor
    seed, start = torch.randint(2**53, (2,)).tolist()
    start %= PERIOD
    periods = -(-x.numel() // PERIOD)
    bits = np.random.SFC64(seed).random_raw(periods * PERIOD // 8).view(np.uint8)
    keep = bits.reshape(periods, PERIOD) >= _thresholds(dropped)[start : start + PERIOD]
    return torch.from_numpy(keep.ravel()[: x.numel()]).view(x.shape), factor


@lru_cache
def _thresholds(dropped: int) -> np.ndarray:
    """Return two periods of eight-bit thresholds whose mean is ``dropped / PERIOD``."""
    low, remainder = divmod(dropped, PERIOD)
    # Spread the higher threshold evenly, `remainder` times per period.
    is_higher = np.arange(2 * PERIOD) * remainder % PERIOD < remainder
    return (low + is_higher).astype(np.uint8)


def multiplier(keep: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """Return `factor` where `keep` is True and 0 elsewhere, in `dtype`.

    Multiplies the bits of `factor` as integers: CPUs vectorise the cast from bool to an integer, not to a float.
    """
    bits = torch.tensor(factor, dtype=dtype).view(_INTEGERS[dtype.itemsize])
    return keep.view(torch.int8).to(bits.dtype).mul_(bits).view(dtype)


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Dropout(Function):
    @staticmethod
    def forward(ctx, x, p):
        keep, ctx.factor = kept(x, p)
        ctx.save_for_backward(keep)
        return multiplier(keep, ctx.factor, x.dtype).mul_(x)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        (keep,) = ctx.saved_tensors
        return multiplier(keep, ctx.factor, grad.dtype).mul_(grad), None
