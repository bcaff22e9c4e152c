"""Norms, activations and dropout of a model's layers, computed faster or with less kept for the backward pass.

A layer is known by its class and tried: names alone do not tell what it computes. Some norms add one to their
weights, some round elsewhere.
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
"""Roundings of the dtype by which the results of the two forwards may differ, of the whole: with one rounding more or
less on the way they differ by less than one; another formula shows at once."""


class FasterForward(partial):  # type: ignore[type-arg]
    """A layer's forward that is ours."""


def faster_forward(module: nn.Module) -> FasterForward | None:
    """Return a forward of ours for `module`; None where there is none for what it computes."""
    if isinstance(module, nn.Dropout):  # random: there is nothing to compare
        plain = type(module) is nn.Dropout and module.p and not module.inplace
        return FasterForward(_dropout, module) if plain else None
    for found in (_norm, _gate, _activation):
        if known := found(module):
            forward, example = known
            return forward if _agrees(forward, module, example) else None
    return None


def _norm(module: Any) -> tuple[FasterForward, Tensor] | None:
    """Llama's norm, and that of many models after it."""
    if not type(module).__name__.endswith("RMSNorm"):
        return None
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if [*dict(module.named_parameters())] != ["weight"] or not isinstance(eps, float):
        return None
    return FasterForward(_rms_norm, module, eps), module.weight.new_empty(2, len(module.weight))


def _gate(module: Any) -> tuple[FasterForward, Tensor] | None:
    """Llama's feed-forward network, and that of many models after it."""
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(isinstance(part, nn.Linear) for part in parts):
        return None
    if not isinstance(getattr(module, "act_fn", None), nn.SiLU | SiLUActivation):
        return None
    weight = module.gate_proj.weight
    dtype = weight.dtype if weight.is_floating_point() else torch.float32  # or it is quantised
    example = weight.new_empty(2, module.gate_proj.in_features, dtype=dtype)
    return FasterForward(_gated, module), example


def _activation(module: nn.Module) -> tuple[FasterForward, Tensor] | None:
    """GPT-2's GELU: eight operations, which keep five tensors."""
    if not isinstance(module, NewGELUActivation | FastGELUActivation):
        return None
    return FasterForward(F.gelu, approximate="tanh"), torch.empty(2, 8)


def _agrees(forward: FasterForward, module: nn.Module, example: Tensor) -> bool:
    if example.is_meta or isinstance(example, torch._subclasses.FakeTensor):
        return True  # the layer is only planned: there are no numbers
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
