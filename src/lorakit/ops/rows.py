"""Gather and scatter rows of a batch; round row counts."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lorakit.ops.derivatives import Function, apply

STEP = 32
"""Largest multiple to which row counts are rounded up."""


def round_up(count: int, step: int) -> int:
    """Return the smallest multiple of `step` that is at least `count`."""
    return -(-count // step) * step


def rounded_rows(count: int) -> int:
    """Return `count` rounded up, so that batches with varying row counts share a few sizes.

    The result is a multiple of a power of two. This power is at most an eighth of `count`, and at most 32. The CPU
    library prepares and caches a kernel for each new row count. On a CPU with matrix units each takes up to five
    milliseconds and three megabytes, which can exceed the product itself.
    """
    return round_up(count, min(STEP, 2 ** max(0, (count // 8).bit_length() - 1)))


def gather_rows(x: Tensor, at: Tensor) -> Tensor:
    """Gather the rows of `x` (N, d) at the int64 indices `at` (...), which may repeat, into (..., d).

    The backward pass adds the gradients of a row in a fixed order. That of indexing adds them atomically on a CPU with
    several threads, in another order each time, and takes longer.
    """
    return F.embedding(at, x)


def take_rows(x: Tensor, at: Tensor) -> Tensor:
    """Gather the rows of `x` (N, ...) at the unique int64 indices `at` (M,), into (M, ...).

    The backward pass copies the gradients into place. Indexing would accumulate them, which duplicate indices need
    and unique ones do not.
    """
    return apply(_Take, x, at)


def put_rows(rows: Tensor, at: Tensor, count: int) -> Tensor:
    """Scatter `rows` (M, ...) to the unique int64 indices `at` (M,) of a zero tensor with `count` rows."""
    return apply(_Put, rows, at, count)


def _scatter(rows: Tensor, at: Tensor, count: int) -> Tensor:
    return rows.new_zeros(count, *rows.shape[1:]).index_copy_(0, at, rows)


class _Take(Function):
    instead = "call the model itself, not lorakit's training loss"

    @staticmethod
    def forward(ctx, x, at):
        ctx.save_for_backward(at)
        ctx.count = len(x)
        return x.index_select(0, at)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        (at,) = ctx.saved_tensors
        return _scatter(grad, at, ctx.count), None


class _Put(Function):
    """PyTorch's `index_copy` keeps the rows until the backward pass, which needs the indices alone."""

    instead = "call the model itself, not lorakit's training loss"

    @staticmethod
    def forward(ctx, rows, at, count):
        ctx.save_for_backward(at)
        return _scatter(rows, at, count)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        (at,) = ctx.saved_tensors
        return grad.index_select(0, at), None, None
