"""The operations of `lorakit.ops` in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.ops.autocast import wide_dtype


def masked_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, scale: float
) -> Tensor:
    """Compute `masked_attention` without dropout in plain PyTorch."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = (query @ key.transpose(-1, -2)).to(wide_dtype(query)) * scale
    if mask is not None and mask.is_floating_point():
        scores = scores + mask
    elif mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1).to(query.dtype) @ value).transpose(1, 2)


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Compute `linear_cross_entropy` in plain PyTorch."""
    logits = F.linear(
        hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    )
    logits = logits.to(wide_dtype(logits))
    if weights is None:
        return F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="sum")
    loss = F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="none")
    return loss @ weights.to(loss.dtype)


def lora_linear_reference(x: Tensor, out: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Compute `lora_linear` in plain PyTorch."""
    x = x.to(out.dtype)
    return out + scaling * ((x @ A.to(out.dtype).T) @ B.to(out.dtype).T)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute `rms_norm` in plain PyTorch."""
    wide = x.to(wide_dtype(x))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def silu_product_reference(gate: Tensor, up: Tensor) -> Tensor:
    """Compute `silu_product` in plain PyTorch."""
    return F.silu(gate) * up
