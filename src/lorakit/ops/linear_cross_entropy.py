"""Cross-entropy over a large vocabulary without ever holding all logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

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
    The weight and bias are taken as frozen. The gradient for `hidden` is formed chunk by chunk in the
    forward pass, while the chunk's probabilities are at hand, so the backward pass is one product.

    Args:
        hidden: Shape (n, d).
        weight: Output projection, shape (V, d), the dtype of `hidden`.
        targets: Token ids, shape (n,).
        bias: Shape (V,) or None.
        weights: Factor on each row's loss, shape (n,), or None for 1.
        label_smoothing: Between 0 and 1.
        chunk: Rows at a time; None chooses by the vocabulary's size.

    Returns:
        The summed loss, a float32 scalar (float64 for float64 input).
    """
    if chunk is None:
        chunk = max(16, CHUNK_BYTES // (hidden.element_size() * weight.shape[0]))
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
    logits = F.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if weights is None:
        return F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="sum")
    loss = F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="none")
    return loss @ weights.to(loss.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, weights, label_smoothing, chunk):
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        wide = torch.promote_types(hidden.dtype, torch.float32)
        losses = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        block = _rows_in_cache(hidden.device, weight.shape[0], wide)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = F.linear(hidden[rows], weight, bias)
            for part, target, factor, out in zip(
                logits.split(block),
                targets[rows].split(block),
                [None] * len(logits) if weights is None else weights[rows].split(block),
                losses[rows].split(block),
                strict=False,
            ):
                _to_gradient(part, target, factor, out, label_smoothing, keep=grad is not None)
            if grad is not None:
                torch.mm(logits, weight, out=grad[rows])
        if grad is not None:
            ctx.save_for_backward(grad)
        return losses.sum()

    @staticmethod
    def backward(ctx, grad_total):  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = ctx.saved_tensors
        return grad * grad_total.to(grad.dtype), None, None, None, None, None, None


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
