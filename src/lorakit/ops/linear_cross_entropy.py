"""Cross-entropy over a large vocabulary without ever holding all logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.ops.rows import STEP, rounded_rows

CHUNK_BYTES = 32 * 2**20
"""Size of one chunk of logits: enough rows that the products are efficient, and no more."""

CACHE_BYTES = 3 * 2**20
"""Size of the rows of a chunk that are turned from logits into gradients together."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    chunk: int | None = None,
) -> Tensor:
    """Sum over n, weighted, of the cross-entropy between ``hidden W^T + b`` and `targets`.

    With label smoothing e each token's loss is ``(1 - e) * NLL + e * mean over V of -log p``.
    The gradients that are needed, of `hidden`, `weight` and `bias`, are formed chunk by chunk in the
    forward pass, while the chunk's probabilities are at hand; the backward pass only scales them.

    Those of `weight` and `bias` are summed over the chunks in float32 (or wider) and rounded to their
    dtype at the end: a running sum in bfloat16 would lose what a later chunk adds to it.

    Args:
        hidden: Shape (n, d). Its dtype is that of the products.
        weight: Output projection, shape (V, d), the dtype of `hidden` or wider: a float32 master is
            rounded once for the products, and gets its gradient in float32.
        targets: Token ids, shape (n,).
        bias: Shape (V,) or None; its dtype as that of `weight`.
        weights: Factor on each row's loss, shape (n,), or None for 1.
        label_smoothing: Between 0 and 1.
        chunk: Rows at a time; None chooses by the vocabulary's size.

    Returns:
        The summed loss, a float32 scalar (float64 for float64 input).
    """
    if chunk is None:
        chunk = max(16, CHUNK_BYTES // (hidden.element_size() * weight.shape[0]) // STEP * STEP)
    return _LinearCrossEntropy.apply(hidden, weight, targets, bias, weights, label_smoothing, chunk)


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Plain PyTorch twin of `linear_cross_entropy`."""
    logits = F.linear(hidden, weight.to(hidden.dtype), _cast(bias, hidden.dtype))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if weights is None:
        return F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="sum")
    loss = F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="none")
    return loss @ weights.to(loss.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, weights, label_smoothing, chunk):
        of_hidden, of_weight, _, of_bias = ctx.needs_input_grad[:4]
        hidden_grad = torch.empty_like(hidden) if of_hidden else None
        weight_grad = _zeros_like(weight) if of_weight else None
        bias_grad = _zeros_like(bias) if of_bias else None
        narrow_weight, narrow_bias = weight.to(hidden.dtype), _cast(bias, hidden.dtype)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        losses = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        block = _rows_in_cache(hidden.device, weight.shape[0], wide)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            count, given = len(hidden[rows]), _rounded(hidden[rows])
            logits = F.linear(given, narrow_weight, narrow_bias)
            for part, target, factor, out in zip(
                logits[:count].split(block),
                targets[rows].split(block),
                [None] * count if weights is None else weights[rows].split(block),
                losses[rows].split(block),
                strict=False,
            ):
                keep = of_hidden or of_weight or of_bias
                _to_gradient(part, target, factor, out, label_smoothing, keep=keep)
            logits[count:] = 0
            if hidden_grad is not None:
                hidden_grad[rows] = (logits @ narrow_weight)[:count]
            if weight_grad is not None:
                _add_product(weight_grad, logits.t(), given)
            if bias_grad is not None:
                bias_grad += logits.sum(0, dtype=bias_grad.dtype)
        ctx.save_for_backward(
            hidden_grad,
            _cast(weight_grad, weight.dtype),
            None if bias_grad is None else bias_grad.to(bias.dtype),
        )
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total):  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, bias = (
            None if grad is None else grad * grad_total.to(grad.dtype) for grad in ctx.saved_tensors
        )
        return hidden, weight, None, bias, None, None, None


def _rounded(rows: Tensor) -> Tensor:
    """`rows` (n, d), with zeros behind them up to a number of rows for which products are known."""
    more = rounded_rows(len(rows)) - len(rows)
    return F.pad(rows, (0, 0, 0, more)) if more else rows


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _zeros_like(tensor: Tensor) -> Tensor:
    """Where a gradient is summed, in float32 or wider."""
    return torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a b``, without a product of full size in between where the dtypes allow."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)


def _to_gradient(
    logits: Tensor,
    target: Tensor,
    factor: Tensor | None,
    losses: Tensor,
    label_smoothing: float,
    *,
    keep: bool,
) -> None:
    """Turn logits (n, V) into the gradient of their losses in place, and write the losses (n,).

    ``d loss / d logits = factor * (softmax - smoothed one-hot)``.
    """
    target = target[:, None]
    wide = logits.to(losses.dtype)  # the logits themselves where they are wide already
    at_target = wide.gather(1, target).squeeze(1)
    mean = wide.mean(1) if label_smoothing else None
    largest = wide.amax(1, keepdim=True)
    scaled = wide.sub_(largest).exp_()
    total = scaled.sum(1, keepdim=True)
    loss = (largest + total.log()).squeeze(1) - (1 - label_smoothing) * at_target
    if mean is not None:
        loss -= label_smoothing * mean
    losses.copy_(loss if factor is None else loss * factor)
    if not keep:
        return
    gradient = scaled.div_(total)
    if label_smoothing:
        gradient.sub_(label_smoothing / logits.shape[1])
    gradient.scatter_add_(1, target, torch.full_like(total, label_smoothing - 1))
    if factor is not None:
        gradient.mul_(factor[:, None])
    if gradient is not logits:
        logits.copy_(gradient)


def _rows_in_cache(device: torch.device, vocabulary: int, dtype: torch.dtype) -> int:
    """Rows whose float32 logits stay in a processor's cache while five passes go over them."""
    if device.type != "cpu":
        return 2**30
    return max(1, CACHE_BYTES // (vocabulary * dtype.itemsize))
