"""Root mean square normalisation that saves its input, not float32 copies, for the backward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.ops.autocast import no_autocast, wide_dtype
from lorakit.ops.derivatives import Function, apply, once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return ``weight * x / sqrt(mean(x^2) + eps)`` over the last dimension (Zhang and Sennrich 2019, equation 4).

    The quotient is computed in float32 (float64 for float64 input) and rounded to the dtype of `x` before the
    multiplication by `weight`, as in transformers. Its models save the float32 input and the quotient for a
    backward pass of eleven operations. This function saves `x`, `weight` and one number per row.

    Args:
        x: Shape (..., D).
        weight: Shape (D,).
        eps: Added to the mean square.

    Returns:
        Shape (..., D), the dtype that `weight` and `x` promote to.
    """
    with no_autocast(x):
        return apply(_RMSNorm, x, weight, eps)


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide_dtype(x))
        rate = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rate)
        return weight * _quotient(x, rate)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, rate = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        grad_x = grad_weight = None
        if needs_weight:
            product = grad * _quotient(x, rate)
            grad_weight = product.flatten(0, -2).sum(0, dtype=wide_dtype(product)).to(weight.dtype)
        if needs_x:
            # r (g - n mean(g n)), with the rate r, n = r x, and the gradient g of n.
            wide = x.to(rate.dtype)
            grad_x = (grad * weight).to(rate.dtype)
            share = (grad_x * wide).mean(-1, keepdim=True).mul_(rate.square())
            grad_x = grad_x.addcmul(wide, share, value=-1).mul_(rate).to(x.dtype)
        return grad_x, grad_weight, None


def _quotient(x: Tensor, rate: Tensor) -> Tensor:
    return (x.to(rate.dtype) * rate).to(x.dtype)
