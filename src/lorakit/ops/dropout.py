"""Dropout whose random numbers do not cost more than the layer they fall on."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

STEPS = 2**16
"""Each element takes 16 random bits: a probability is rounded to 1 / 65,536."""


def dropout(x: Tensor, p: float) -> Tensor:
    """Return `x` with each element set to zero with probability `p`, the others divided by ``1 - p``.

    On a CPU the random bits come from a small fast generator (SFC64) that one draw of torch's default
    generator seeds, so that torch's seed and saved state still decide everything; elsewhere and under a
    compiler it is `torch.nn.functional.dropout`.

    Args:
        x: Any shape.
        p: Between 0 and 1, rounded to 1 / 65,536; the factor on what is kept is that of the rounded one.
    """
    if not fast(x) or not 0 < p < 1:
        return F.dropout(x, p)
    return _Dropout.apply(x, p)


def fast(x: Tensor) -> bool:
    """Whether `x` is served by the fast generator."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def kept(x: Tensor, p: float) -> tuple[Tensor, float]:
    """Draw which elements of `x` are kept: a bool tensor on the CPU, and the factor on what is kept."""
    threshold = min(max(round(p * STEPS), 1), STEPS - 1)
    if isinstance(x, torch._subclasses.FakeTensor):  # a step that is only planned has no numbers
        return torch.empty(x.shape, dtype=torch.bool), STEPS / (STEPS - threshold)
    shape, count = x.shape, x.numel()
    seed = int(torch.randint(2**63 - 1, ()))
    words = np.random.SFC64(seed).random_raw(-(-count // 4))
    drawn = words.view(np.uint16)[:count] >= threshold
    return torch.from_numpy(drawn).view(shape), STEPS / (STEPS - threshold)


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
