"""Addition of the low-rank products of several adapters, each to its own tokens of a batch.

Tokens of one adapter are gathered, multiplied by its thin matrices, and scattered back. No product is ever masked:
NaN of one adapter stays in its tokens.

Suffixes name dimensions: N tokens of the batch, M tokens of one segment, D inputs, R rank, O outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lorakit.ops.autocast import no_autocast
from lorakit.ops.derivatives import Function, apply
from lorakit.ops.lora_linear import require_data


class Segment(NamedTuple):
    """One adapter's tokens and matrices."""

    tokens: slice | Tensor
    """Slice, or int64 index of unique tokens."""
    A: Tensor
    """Shape (rank, in)."""
    B: Tensor
    """Shape (out, rank)."""
    scaling: float


def lora_segments(
    x: Tensor, out: Tensor, segments: Sequence[Segment], *, in_place: bool = False
) -> Tensor:
    """Return ``out + scaling * x A^T B^T``, with the A, B and scaling of each token's segments.

    Computes what `lora_linear` computes for the tokens of each segment. Tokens outside all segments keep `out`.

    Args:
        x: Input of the layer, shape (N, in).
        out: Output of the frozen layer, shape (N, out).
        segments: Their tokens may overlap: the products are then added.
        in_place: Without gradients, write into `out`, which no other code may use afterwards.

    Returns:
        Shape (N, out), the dtype of `out`; a new tensor unless `in_place` is set.
    """
    for segment in segments:
        require_data(segment.A, x)
    if x.dtype != out.dtype:
        x = x.to(out.dtype)
    with no_autocast(out):
        if torch.is_grad_enabled():
            factors = [t for segment in segments for t in (segment.A, segment.B)]
            return apply(_LoraSegments, x, out, [(s.tokens, s.scaling) for s in segments], *factors)
        return _add_products(x, out if in_place else out.clone(), segments)


def _add_products(x: Tensor, out: Tensor, segments: Sequence[Segment]) -> Tensor:
    """Compute `lora_segments` without gradients, in `out`."""
    dtypes = {t.dtype for segment in segments for t in (segment.A, segment.B)}
    wide = functools.reduce(torch.promote_types, dtypes, out.dtype)
    if wide == out.dtype or x.numel() > sum(segment.A.numel() for segment in segments):
        for tokens, A, B, scaling in segments:
            _add_product(out, tokens, x[tokens] @ A.to(out.dtype).T, B.to(out.dtype), scaling)
        return out
    # For few tokens, casting them has less overhead than casting the matrices.
    delta, x = torch.zeros_like(out, dtype=wide), x.to(wide)
    for tokens, A, B, scaling in segments:
        _add_product(delta, tokens, x[tokens] @ A.to(wide).T, B.to(wide), scaling)
    return out.add_(delta.to(out.dtype))


def _add_product(
    total: Tensor, tokens: slice | Tensor, h_MR: Tensor, B: Tensor, scaling: float
) -> None:
    """Add ``scaling * h B^T`` to the tokens of `total`."""
    if isinstance(tokens, slice):
        total[tokens].addmm_(h_MR, B.T, alpha=scaling)
    else:
        sums = torch.addmm(total[tokens], h_MR, B.T, alpha=scaling)
        total.index_copy_(0, tokens, sums)


class _LoraSegments(Function):
    instead = "activate one adapter for the whole batch"

    @staticmethod
    def forward(ctx, x, out, segments, *factors):
        total, hidden = out.clone(), []
        for (tokens, scaling), A, B in zip(segments, factors[::2], factors[1::2], strict=True):
            h_MR = x[tokens] @ A.to(out.dtype).T
            _add_product(total, tokens, h_MR, B.to(out.dtype), scaling)
            hidden.append(h_MR)
        indices = [tokens for tokens, _ in segments if isinstance(tokens, Tensor)]
        ctx.save_for_backward(x, *factors, *hidden, *indices)
        ctx.segments = [(None if isinstance(t, Tensor) else t, scaling) for t, scaling in segments]
        return total

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        count = len(ctx.segments)
        x, *rest = ctx.saved_tensors
        factors, hidden, indices = rest[: 2 * count], rest[2 * count : 3 * count], rest[3 * count :]
        indices = iter(indices)
        grad_x = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        grads = []
        for i, (tokens, scaling) in enumerate(ctx.segments):
            A, B, h_MR = factors[2 * i], factors[2 * i + 1], hidden[i]
            tokens = next(indices) if tokens is None else tokens
            if torch.is_grad_enabled():  # for a second derivative, which h has too
                h_MR = x[tokens] @ A.to(x.dtype).T
            grad_MO = grad[tokens]
            needs_A, needs_B = ctx.needs_input_grad[3 + 2 * i : 5 + 2 * i]
            grad_h_MR = (grad_MO @ B.to(grad.dtype)) * scaling
            grads.append((grad_h_MR.T @ x[tokens]).to(A.dtype) if needs_A else None)
            grads.append(((grad_MO.T @ h_MR) * scaling).to(B.dtype) if needs_B else None)
            if grad_x is not None:
                grad_x[tokens] = torch.addmm(grad_x[tokens], grad_h_MR, A.to(grad.dtype))
        return grad_x, grad, None, *grads
