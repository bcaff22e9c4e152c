"""Some rows of a batch: how many at best, taken out, and put back."""

from __future__ import annotations

from torch import Tensor
from torch.autograd import Function

STEP = 32
"""Rows are rounded up to multiples of this at most."""


def rounded_rows(count: int) -> int:
    """Return how many rows to compute where `count` are needed and this number is another in each batch.

    For every new number of rows a library prepares the kernels of its products anew, and keeps them: on a CPU with
    matrix units up to five milliseconds and three megabytes each, more than the product itself may take. A few numbers
    are soon all known.

    Returns:
        The next multiple of a power of two, which is an eighth of `count` at most, and 32 at most.
    """
    step = min(STEP, 2 ** max(0, (count // 8).bit_length() - 1))
    return -(-count // step) * step


def take_rows(x: Tensor, at: Tensor) -> Tensor:
    """Return the rows of `x` at the indices `at`.

    Indexing does the same, and adds up the gradients of rows that are taken twice. Here none is, so that they are
    written where they belong.

    Args:
        x: Shape (N, ...).
        at: Int64, shape (M,), each index once.

    Returns:
        Shape (M, ...).
    """
    return _Take.apply(x, at)


def put_rows(rows: Tensor, at: Tensor, count: int) -> Tensor:
    """Return `count` rows that are zero but for `rows`, which stand at the indices `at`.

    Args:
        rows: Shape (M, ...).
        at: Int64, shape (M,), each index once.
        count: Number of rows, N.

    Returns:
        Shape (N, ...).
    """
    return _Put.apply(rows, at, count)


def _placed(rows: Tensor, at: Tensor, count: int) -> Tensor:
    return rows.new_zeros(count, *rows.shape[1:]).index_copy_(0, at, rows)


class _Take(Function):
    @staticmethod
    def forward(ctx, x, at):
        ctx.save_for_backward(at)
        ctx.count = len(x)
        return x.index_select(0, at)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        (at,) = ctx.saved_tensors
        return _placed(grad, at, ctx.count), None


class _Put(Function):
    @staticmethod
    def forward(ctx, rows, at, count):
        ctx.save_for_backward(at)
        return _placed(rows, at, count)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        (at,) = ctx.saved_tensors
        return grad.index_select(0, at), None, None
