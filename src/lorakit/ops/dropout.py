"""Dropout with 16 random bits for an element on a CPU, where drawing them takes most of the time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.ops.derivatives import Function, apply, is_transformed

STEPS = 2**16
"""Resolution of the probability: it is rounded to a multiple of 1 / 65,536."""


def dropout(x: Tensor, p: float) -> Tensor:
    """Return `x` with each element set to zero with probability `p`, the others divided by ``1 - p``.

    The random bits come from torch's default generator. On other devices than a CPU, and under torch.compile and
    torch.func, this is `torch.nn.functional.dropout`.

    Args:
        x: Any shape.
        p: Between 0 and 1, rounded to a multiple of 1 / 65,536. The scale factor uses the rounded value.
    """
    is_ours = x.device.type == "cpu" and p > 0 and not torch.compiler.is_compiling()
    if not is_ours or is_transformed(x):
        return F.dropout(x, p)
    return apply(_Dropout, x, p)


def keep_mask(x: Tensor, p: float) -> Tensor:
    """Draw a bool tensor that marks the elements of `x` to keep."""
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    numbers = words.random_(-(2**63), None).view(torch.int16)
    return numbers[: x.numel()].view(x.shape) > _dropped(p) - STEPS // 2 - 1


def multiplier(keep: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """Return ``1 / (1 - p)`` where `keep` is True and 0 elsewhere, in `dtype`.

    Multiplies the bits of the factor as integers: CPUs vectorise the cast from bool to an integer, not to a float.
    """
    factor = STEPS / max(STEPS - _dropped(p), 1)
    bits = torch.tensor(factor, dtype=dtype).view(_INTEGERS[dtype.itemsize])
    return keep.view(torch.int8).to(bits.dtype).mul_(bits).view(dtype)


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _dropped(p: float) -> int:
    return max(round(p * STEPS), 1)


class _Dropout(Function):
    @staticmethod
    def forward(ctx, x, p):
        keep, ctx.p = keep_mask(x, p), p
        ctx.save_for_backward(keep)
        return multiplier(keep, p, x.dtype).mul_(x)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        (keep,) = ctx.saved_tensors
        return multiplier(keep, ctx.p, grad.dtype).mul_(grad), None
