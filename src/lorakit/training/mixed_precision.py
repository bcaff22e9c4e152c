"""Layers with one trained parameter in float32 and another, frozen, in the base's precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorakit.models.layers import by_token


def let_norms_compute(model: nn.Module) -> None:
    """Give norms whose bias alone is trained (BitFit) both their parameters in float32, call by call.

    A norm refuses a weight in bfloat16 beside a bias in float32, and autocast, which would bring a projection's
    parameters to one precision, leaves a norm's alone on a CPU. The frozen parameter itself stays as it is.
    """
    for module in model.modules():
        own = [p for p in module._parameters.values() if p is not None]
        if own and isinstance(module, nn.LayerNorm) and len({p.dtype for p in own}) > 1:
            module.register_forward_pre_hook(_widen)
            module.register_forward_hook(_narrow, always_call=True)


@by_token
def _widen(norm: nn.Module, args: Any) -> None:
    for name, parameter in norm._parameters.items():
        if isinstance(parameter, Tensor) and not parameter.requires_grad:
            # In the instance's dict the tensor hides the parameter of that name for the call's length.
            norm.__dict__[name] = parameter.to(torch.float32)


@by_token
def _narrow(norm: nn.Module, args: Any, output: Any) -> None:
    for name in norm._parameters:
        norm.__dict__.pop(name, None)
