"""Cross-entropy over a large vocabulary without ever holding all logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 32 * 2**20
"""Size of one chunk of float32 logits; a few times the cache, so that the products stay efficient."""


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
        chunk = max(16, CHUNK_BYTES // (4 * weight.shape[0]))
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
        vocabulary = weight.shape[0]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        needs_grad = ctx.needs_input_grad[0]
        grad = torch.empty_like(hidden) if needs_grad else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        uniform = label_smoothing / vocabulary
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            logits = F.linear(hidden[rows], weight, bias).to(wide)
            target = targets[rows, None]
            log_norm = torch.logsumexp(logits, dim=-1, keepdim=True)
            at_target = logits.gather(1, target)
            loss = log_norm - (1 - label_smoothing) * at_target
            if label_smoothing:
                loss -= uniform * logits.sum(dim=-1, keepdim=True)
            factor = None if weights is None else weights[rows, None].to(wide)
            total += loss.sum() if factor is None else (loss * factor).sum()
            if grad is not None:
                # d loss / d logits = softmax - smoothed one-hot, built in the logits' own memory.
                probabilities = logits.sub_(log_norm).exp_()
                if label_smoothing:
                    probabilities.sub_(uniform)
                probabilities.scatter_add_(
                    1, target, torch.full_like(at_target, label_smoothing - 1)
                )
                if factor is not None:
                    probabilities.mul_(factor)
                torch.mm(probabilities.to(hidden.dtype), weight, out=grad[rows])
        if grad is not None:
            ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx, grad_total):  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = ctx.saved_tensors
        return grad * grad_total.to(grad.dtype), None, None, None, None, None, None
