"""Cross-entropy over a large vocabulary, computed in chunks of logits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.ops.autocast import wide_dtype
from lorakit.ops.derivatives import Function, apply, once_differentiable
from lorakit.ops.rows import STEP, rounded_rows

CHUNK_BYTES = 32 * 2**20
"""Size of one chunk of logits: the smallest at which the products are efficient."""

CACHE_BYTES = 3 * 2**20
"""Size of the block of logits that a CPU turns into gradients at a time; it fits the processor's cache."""


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
    """Return the weighted sum over n of the cross-entropy between ``hidden W^T + b`` and `targets`.

    With label smoothing e each token's loss is ``(1 - e) * NLL + e * mean over V of -log p``.
    The forward pass computes the gradients of `hidden`, `weight` and `bias`, if needed, from each chunk's
    probabilities. The backward pass only scales them.

    The gradients of `weight` and `bias` are accumulated over the chunks in float32 (or wider) and rounded to their
    dtype at the end. A running sum in bfloat16 would lose the contributions of later chunks.

    Args:
        hidden: Shape (n, d). The products are computed in its dtype.
        weight: Output projection, shape (V, d), the dtype of `hidden` or wider. A float32 master is rounded
            once for the products, and gets a float32 gradient.
        targets: Token ids, shape (n,).
        bias: Shape (V,) or None; the dtype of `hidden` or wider.
        weights: Factor on each row's loss, shape (n,), or None for 1.
        label_smoothing: Between 0 and 1.
        chunk: Rows per chunk; None chooses by the vocabulary's size.

    Returns:
        The summed loss, a float32 scalar (float64 for float64 input).
    """
    if chunk is None:
        chunk = max(16, CHUNK_BYTES // (hidden.element_size() * weight.shape[0]) // STEP * STEP)
    # Under no_grad, `needs_input_grad` is still true for a parameter.
    settings = label_smoothing, chunk, torch.is_grad_enabled()
    return apply(_LinearCrossEntropy, hidden, weight, targets, bias, weights, *settings)


class _LinearCrossEntropy(Function):
    instead = "the model's own loss, or torch.nn.functional.cross_entropy of its logits"

    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, weights, label_smoothing, chunk, grad_enabled):
        needs_hidden, needs_weight, _, needs_bias = (
            grad_enabled and needed for needed in ctx.needs_input_grad[:4]
        )
        hidden_grad = torch.empty_like(hidden) if needs_hidden else None
        weight_grad = _accumulator(weight) if needs_weight else None
        bias_grad = _accumulator(bias) if needs_bias else None
        # In the dtype of the products.
        narrow_weight, narrow_bias = weight.to(hidden.dtype), _cast(bias, hidden.dtype)
        losses = torch.empty(len(hidden), dtype=wide_dtype(hidden), device=hidden.device)
        block_rows = _rows_in_cache(hidden.device, weight.shape[0], losses.dtype)
        for rows in row_chunks(hidden, chunk):
            count, padded = len(hidden[rows]), _pad_rows(hidden[rows])
            logits = F.linear(padded, narrow_weight, narrow_bias)
            live, chunk_targets, chunk_losses = logits[:count], targets[rows], losses[rows]
            factors = None if weights is None else weights[rows]
            needs_grad = needs_hidden or needs_weight or needs_bias
            for block in row_chunks(live, block_rows):
                _to_gradient(
                    live[block],
                    chunk_targets[block],
                    None if factors is None else factors[block],
                    chunk_losses[block],
                    label_smoothing,
                    needs_grad=needs_grad,
                )
            # From here on `logits` has their gradients, zero in the rows of padding.
            logits[count:] = 0
            if hidden_grad is not None:
                hidden_grad[rows] = (logits @ narrow_weight)[:count]
            if weight_grad is not None:
                _accumulate_product(weight_grad, logits.t(), padded)
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
        hidden_grad, weight_grad, bias_grad = (
            None if grad is None else grad * grad_total for grad in ctx.saved_tensors
        )
        return hidden_grad, weight_grad, None, bias_grad, None, None, None, None


def row_chunks(hidden: Tensor, chunk: int) -> Iterator[slice]:
    """Yield the rows of each chunk of `hidden` (n, d), or of each block of logits (n, V)."""
    for start in range(0, len(hidden), chunk):
        yield slice(start, start + chunk)


def _pad_rows(rows: Tensor) -> Tensor:
    """Pad `rows` (n, d) with zeros to `rounded_rows`."""
    padding = rounded_rows(len(rows)) - len(rows)
    return F.pad(rows, (0, 0, 0, padding)) if padding else rows


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _accumulator(tensor: Tensor) -> Tensor:
    """Return zeros in float32 or wider, for the gradient of `tensor`."""
    return torch.zeros_like(tensor, dtype=wide_dtype(tensor))


def _accumulate_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Compute ``total += a b``, without a full-size temporary if the dtypes are equal."""
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
    needs_grad: bool,
) -> None:
    """Write the losses (n,), and overwrite the logits (n, V) with the gradient of the losses if needed.

    ``d loss / d logits = factor * (softmax - smoothed one-hot)``.
    """
    target = target[:, None]
    wide = logits.to(losses.dtype)  # may be `logits` itself
    at_target = wide.gather(1, target).squeeze(1)
    mean = wide.mean(1) if label_smoothing else None
    largest = wide.amax(1, keepdim=True)
    scaled = wide.sub_(largest).exp_()
    total = scaled.sum(1, keepdim=True)
    loss = (largest + total.log()).squeeze(1) - (1 - label_smoothing) * at_target
    if mean is not None:
        loss -= label_smoothing * mean
    losses.copy_(loss if factor is None else loss * factor)
    if not needs_grad:
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
    """Return the number of rows whose logits stay in the CPU's cache during five passes; no limit on a GPU."""
    if device.type != "cpu":
        return 2**30
    return max(1, CACHE_BYTES // (vocabulary * dtype.itemsize))
