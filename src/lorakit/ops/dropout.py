"""Dropout whose random numbers do not cost more than the layer they fall on."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PERIOD = 2**10
"""After so many elements the pattern of thresholds begins anew."""

STEPS = 2**8 * PERIOD
"""A probability is rounded to 1 / 262,144."""


def dropout(x: Tensor, p: float) -> Tensor:
    """Return `x` with each element set to zero with probability `p`, the others divided by ``1 - p``.

    On a CPU the random bits come from a small fast generator (SFC64) that one draw of torch's default
    generator seeds, so that torch's seed and saved state still decide everything; elsewhere and under a
    compiler it is `torch.nn.functional.dropout`.

    Random bits are what it costs, so each element takes eight, which are held against a threshold. Where p is no
    multiple of 1 / 256, as many elements have the next higher threshold as give p on average, and a random start
    of that pattern gives each of them the same probability.

    Args:
        x: Any shape.
        p: Between 0 and 1, rounded to 1 / 262,144; the factor on what is kept is that of the rounded one.
    """
    if not fast(x) or not 0 < p < 1:
        return F.dropout(x, p)
    return _Dropout.apply(x, p)


def fast(x: Tensor) -> bool:
    """Whether `x` is served by the fast generator."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def kept(x: Tensor, p: float) -> tuple[Tensor, float]:
    """Draw which elements of `x` are kept: a bool tensor on the CPU, and the factor on what is kept."""
    dropped = max(round(p * STEPS), 1)
    factor = STEPS / max(STEPS - dropped, 1)
    if isinstance(x, torch._subclasses.FakeTensor):  # a step that is only planned has no numbers
        return torch.empty(x.shape, dtype=torch.bool).bernoulli_(), factor
    if p > 255 / 256:  # no threshold of eight bits is so high
        return torch.rand(x.shape, dtype=torch.float64, device=x.device) >= dropped / STEPS, factor
    seed, start = torch.randint(2**53, (2,)).tolist()
    start %= PERIOD
    periods = -(-x.numel() // PERIOD)
    drawn = np.random.SFC64(seed).random_raw(periods * PERIOD // 8).view(np.uint8)
    shown = drawn.reshape(periods, PERIOD) >= _thresholds(dropped)[start : start + PERIOD]
    return torch.from_numpy(shown.ravel()[: x.numel()]).view(x.shape), factor


@lru_cache
def _thresholds(dropped: int) -> np.ndarray:
    """Two periods of thresholds, of the 256 values of eight bits, whose mean is ``dropped / PERIOD``."""
    whole, more = divmod(dropped, PERIOD)
    higher = (
        np.arange(2 * PERIOD) * more % PERIOD < more
    )  # in even distances, `more` times a period
    return (whole + higher).astype(np.uint8)


def multiplier(drawn: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """Return `factor` where `drawn` is True and 0 elsewhere, in `dtype`.

    Made of the number's bits: from bool to a float a processor converts one by one, to an integer many at once.
    """
    bits = torch.tensor(factor, dtype=dtype).view(_INTEGERS[dtype.itemsize])
    return drawn.view(torch.int8).to(bits.dtype).mul_(bits).view(dtype)


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        drawn, ctx.factor = kept(x, p)
        ctx.save_for_backward(drawn)
        return multiplier(drawn, ctx.factor, x.dtype).mul_(x)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        (drawn,) = ctx.saved_tensors
        return multiplier(drawn, ctx.factor, grad.dtype).mul_(grad), None
