"""Norms, activations and dropout that are faster or keep less for the backward pass.

A layer is recognised by its class and then checked on an example, since a name does not determine the formula: some
norms add one to their weights, some round elsewhere.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import FastGELUActivation, NewGELUActivation, SiLUActivation

from lorakit.ops import dropout, rms_norm, silu_product

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
    for match in (_norm, _gate, _activation):
        if candidate := match(module):
            forward, example = candidate
            return forward if _agrees(forward, module, example) else None
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
    """Match the gated MLP of Llama, which many later models share."""
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(isinstance(part, nn.Linear) for part in parts):
        return None
    if not isinstance(getattr(module, "act_fn", None), nn.SiLU | SiLUActivation):
        return None
    weight = module.gate_proj.weight
    # Quantised weights are integers.
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    example = weight.new_empty(2, module.gate_proj.in_features, dtype=dtype)
    return FasterForward(_gated, module), example


def _activation(module: nn.Module) -> tuple[FasterForward, Tensor] | None:
    """Match GPT-2's GELU, which runs eight operations and keeps five tensors."""
    if not isinstance(module, NewGELUActivation | FastGELUActivation):
        return None
    return FasterForward(F.gelu, approximate="tanh"), torch.empty(2, 8)


def _agrees(forward: FasterForward, module: nn.Module, example: Tensor) -> bool:
    if example.is_meta or isinstance(example, torch._subclasses.FakeTensor):
        return True  # a planned layer has no numbers
    x = torch.linspace(-3, 5, example.numel(), device=example.device)
    x = x.to(example.dtype).view(example.shape)
    with torch.no_grad():
        own, ours = module(x), forward(x)
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
