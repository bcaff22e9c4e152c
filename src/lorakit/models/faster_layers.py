"""Norms, activations and dropout that are faster or keep less for the backward pass.

A layer is recognised by its class and then checked on an example, since a name does not determine the formula: some
norms add one to their weights, some round elsewhere.
"""

from __future__ import annotations

import inspect
from functools import partial, reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import FastGELUActivation, NewGELUActivation, SiLUActivation

from lorakit.models.layers import device_of
from lorakit.models.packed import packed_by
from lorakit.ops.attention import masked_attention
from lorakit.ops.dropout import dropout
from lorakit.ops.rms_norm import rms_norm
from lorakit.ops.silu_product import silu_product

ROUNDINGS = 4
"""Largest difference between the two outputs, in roundings of the dtype, relative to the norm of the output. One
rounding more or less on the way changes it by less than one; another formula exceeds the limit."""


class FasterForward(partial):  # type: ignore[type-arg]
    """Our forward for a layer, the first argument."""

    def on(self, layer: nn.Module) -> FasterForward:
        """Return the same forward for a copy of the layer."""
        return FasterForward(self.func, layer, *self.args[1:])


def faster_forward(module: nn.Module) -> FasterForward | None:
    """Return our forward for `module`, or None if none computes the same."""
    if isinstance(module, nn.Dropout):  # random, so the outputs cannot be compared
        plain = type(module) is nn.Dropout and module.p and not module.inplace
        return FasterForward(_dropout, module) if plain else None
    for match in (_norm, _gate, _activation, _biased_attention):
        if candidate := match(module):
            forward, *examples = candidate
            return forward if _agrees(forward, module, examples) else None
    return None


def _norm(module: Any) -> tuple[FasterForward, Tensor] | None:
    """Match the norm of Llama, which many later models share."""
    if not type(module).__name__.endswith("RMSNorm"):
        return None
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if [*dict(module.named_parameters())] != ["weight"] or not isinstance(eps, float):
        return None
    return FasterForward(_rms_norm, module, eps), module.weight.new_empty(2, len(module.weight))


def _gate(module: Any) -> tuple[FasterForward, Tensor] | None:
    """Match the gated MLP of Llama, which many later models share.

    The example does not show dropout, or clamps of large values: a forward that uses any other name is rejected.
    """
    names = ("gate_proj", "up_proj", "down_proj")
    if not all(isinstance(getattr(module, name, None), nn.Linear) for name in names):
        return None
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    if code is None or not {"act_fn", *names}.issuperset(code.co_names):
        return None
    if not isinstance(getattr(module, "act_fn", None), nn.SiLU | SiLUActivation):
        return None
    return FasterForward(_gated, module), _example(
        module.gate_proj, 2, module.gate_proj.in_features
    )


def _activation(module: nn.Module) -> tuple[FasterForward, Tensor] | None:
    """Match GPT-2's GELU, which runs eight operations and keeps five tensors."""
    if not isinstance(module, NewGELUActivation | FastGELUActivation):
        return None
    return FasterForward(F.gelu, approximate="tanh"), torch.empty(2, 8)


def _biased_attention(module: Any) -> tuple[FasterForward, Tensor, Tensor, Tensor] | None:
    """Match the attention of MPNet, which adds a bias for the distance of two tokens to each score."""
    if type(module).__name__ != "MPNetSelfAttention":
        return None
    shapes = (1, 2, module.q.in_features), (1, 1, 2, 2), (1, module.num_attention_heads, 2, 2)
    x, mask, bias = (_example(module.q, *shape) for shape in shapes)
    return FasterForward(_mpnet_attention, module), x, mask, bias


def _example(layer: nn.Module, *shape: int) -> Tensor:
    """Return a tensor of this shape in the dtype of a linear layer, float32 if it is quantised, on its device."""
    if packed_by(layer) is not None:
        return torch.empty(shape, device=device_of(layer))
    weight: Any = layer.weight
    return weight.new_empty(
        shape, dtype=weight.dtype if weight.is_floating_point() else torch.float32
    )


def _agrees(forward: FasterForward, module: nn.Module, examples: list[Tensor]) -> bool:
    if examples[0].is_meta or isinstance(examples[0], torch._subclasses.FakeTensor):
        return True  # a planned layer has no numbers
    inputs = [
        torch.linspace(-3, 5, e.numel(), device=e.device).to(e.dtype).view(e.shape)
        for e in examples
    ]
    with torch.no_grad():
        own, ours = module(*inputs), forward(*inputs)
    if isinstance(own, tuple):
        (own,), (ours,) = own, ours
    if own.dtype != ours.dtype:
        return False
    limit = ROUNDINGS * torch.finfo(own.dtype).eps
    return bool((ours.float() - own.float()).norm() <= limit * own.float().norm())


def _dropout(module: nn.Dropout, x: Tensor) -> Tensor:
    return dropout(x, module.p) if module.training else x


def _rms_norm(module: Any, eps: float, x: Tensor) -> Tensor:
    return rms_norm(x, module.weight, eps)


def _gated(module: Any, x: Tensor) -> Tensor:
    return module.down_proj(silu_product(module.gate_proj(x), module.up_proj(x)))


def _mpnet_attention(
    module: Any,
    x: Tensor,
    attention_mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool = False,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Compute attention for `MPNetAttention`: (batch, tokens, features), with masks that are added to the scores."""
    masks = [mask for mask in (position_bias, attention_mask) if mask is not None]
    if output_attentions or any(mask.requires_grad for mask in masks):
        stock = type(module).forward
        return stock(module, x, attention_mask, position_bias, output_attentions, **options)
    heads, width = module.num_attention_heads, module.attention_head_size
    q, k, v = (
        p(x).unflatten(-1, (heads, width)).transpose(1, 2) for p in (module.q, module.k, module.v)
    )
    attended = masked_attention(
        q,
        k,
        v,
        reduce(torch.add, masks) if masks else None,
        scale=width**-0.5,
        dropout=module.dropout.p if module.training else 0.0,
    )
    return (module.o(attended.flatten(2)),)
