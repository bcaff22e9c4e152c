"""Linear layers with 4-bit or 8-bit weights in the formats of bitsandbytes.

Each computes ``y = x W_q^T + b`` with the same ``W_q`` in training and evaluation, on every device, and
is differentiable in ``x`` and ``b``. Their base classes are not on a CPU: `Linear4bit` repacks its weight
in evaluation, which blocks gradients, and `Linear8bitLt` rounds ``x`` to 8 bits in evaluation but not
in training. Both round a trained bias in place to the dtype of ``x``.

Importing this module needs bitsandbytes, so `lorakit.models.quantising` imports it only when needed.
"""

# bitsandbytes' annotations are older than its code.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit.models.digests import digest
from lorakit.models.quantised import expanded_4bit
from lorakit.ops.derivatives import Function, apply


@dataclass(frozen=True)
class OriginalWeight:
    """The properties of an original weight, recorded when it is quantised."""

    layer_class: type[nn.Module]
    """`nn.Linear`, or `Conv1D`, which stores its weight as (in, out)."""
    dtype: torch.dtype
    """Dtype of the original weight, and of the layer's computation."""
    bfloat16: bytes
    """Digest of the original weight rounded to bfloat16."""


class NF4Linear(bnb.nn.Linear4bit):
    """An `nn.Linear` or `Conv1D` in NF4 (Dettmers et al. 2023): 4 bits per number, a float32 scale per 64."""

    def __init__(self, layer: nn.Module) -> None:
        W = _matrix(layer)
        out_features, in_features = W.shape
        options = {"compress_statistics": False, "quant_type": "nf4"}
        super().__init__(
            in_features, out_features, bias=False, compute_dtype=W.dtype, device="meta", **options
        )
        # `to` quantises.
        self.weight = bnb.nn.Params4bit(W, requires_grad=False, **options).to(W.device)
        _take_over(self, layer)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x W_q^T + b``, computed in the dtype of the original weight: (..., in) to (..., out)."""
        dtype, state = self.compute_dtype, self.weight.quant_state
        bias = None if self.bias is None else self.bias.to(dtype)
        # bitsandbytes' product has faster kernels. But on a CPU it applies the wrong scales if a block continues
        # in the next row, and it sums a bias' gradient over the first dimension only.
        exact = self.in_features % state.blocksize == 0
        if exact and (bias is None or not bias.requires_grad):
            product = bnb.matmul_4bit(x.to(dtype), self.weight, quant_state=state, bias=bias)
        else:
            product = apply(_Product, x.to(dtype), self.weight, state, bias, expanded_4bit)
        return product.to(x.dtype)


class Int8Linear(bnb.nn.Linear8bitLt):
    """An `nn.Linear` or `Conv1D` in int8: 8 bits per number, symmetric, a float32 scale per output row."""

    def __init__(self, layer: nn.Module) -> None:
        W = _matrix(layer)
        out_features, in_features = W.shape
        super().__init__(
            in_features, out_features, bias=False, has_fp16_weights=False, device="meta"
        )
        packed, scales, _ = bnb.functional.int8_vectorwise_quant(W.to(torch.float16))
        self.weight = bnb.nn.Int8Params(packed, requires_grad=False, SCB=scales)
        _take_over(self, layer)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x W_q^T + b``, computed in the dtype of `x`: (..., in) to (..., out)."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return apply(_Product, x, self.weight, self.weight.SCB, bias, _expanded_8bit)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        super()._apply(fn, recurse)
        # Moving a module moves the data of a parameter, but not its attributes.
        self.weight.SCB = self.weight.SCB.to(self.weight.device)
        return self


class _Product(Function):
    """``x W_q^T + b``. The backward pass dequantises again, so neither ``W_q`` nor `x` is saved."""

    instead = "load the base in bfloat16 or float32"

    @staticmethod
    def forward(ctx, x, packed, scales, bias, expand):
        ctx.save_for_backward(packed)
        ctx.scales, ctx.expand = scales, expand
        return F.linear(x, expand(packed, scales, x.dtype), bias)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ ctx.expand(*ctx.saved_tensors, ctx.scales, grad.dtype)
        if ctx.needs_input_grad[3]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return grad_x, None, None, grad_bias, None


def _expanded_8bit(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return packed.to(dtype).mul_(scales[:, None] / 127)


def _matrix(layer: nn.Module) -> Tensor:
    """Return the layer's weight as (out, in)."""
    W = layer.weight.detach()  # type: ignore[union-attr, operator]
    return W.T.contiguous() if isinstance(layer, Conv1D) else W  # type: ignore[union-attr]


def _take_over(quantised: Any, layer: Any) -> None:
    W = layer.weight
    quantised.bias = layer.bias
    quantised.made_from = OriginalWeight(type(layer), W.dtype, digest(W, torch.bfloat16))
    quantised.train(layer.training)
