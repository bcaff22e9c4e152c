"""The gate of a SwiGLU network, which saves only its two inputs for the backward pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.ops.derivatives import Function, apply, once_differentiable


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """Return ``silu(gate) * up`` (Shazeer 2020, equation 6), with ``silu(x) = x * sigmoid(x)``.

    `gate` and `up` have the same shape and dtype. Two separate operations would also save silu(gate), a tensor as large
    as `gate`. Here the backward pass recomputes it.
    """
    return apply(_SiLUProduct, gate, up)


class _SiLUProduct(Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up = ctx.saved_tensors
        needs_gate, needs_up = ctx.needs_input_grad
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate) if needs_gate else None
        return grad_gate, F.silu(gate).mul_(grad) if needs_up else None
