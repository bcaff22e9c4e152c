"""Norms with a trained parameter in float32 and a frozen one in the base's dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorakit.models.layers import by_token


def cast_mixed_norms(model: nn.Module) -> None:
    """Cast the frozen weight to float32 during each call of a LayerNorm whose bias alone is trained (BitFit).

    A LayerNorm rejects a bfloat16 weight with a float32 bias, and autocast on a CPU does not cast the parameters of
    norms. The frozen parameter itself keeps its dtype.
    """
    for module in model.modules():
        dtypes = {p.dtype for p in module._parameters.values() if p is not None}
        if isinstance(module, nn.LayerNorm) and len(dtypes) > 1:
            module.register_forward_pre_hook(_widen)
            module.register_forward_hook(_narrow, always_call=True)


@by_token
def _widen(norm: nn.Module, args: Any) -> None:
    for name, parameter in norm._parameters.items():
        if isinstance(parameter, Tensor) and not parameter.requires_grad:
            # An entry of the instance's dict hides the parameter of that name during the call.
            norm.__dict__[name] = parameter.to(torch.float32)


@by_token
def _narrow(norm: nn.Module, args: Any, output: Any) -> None:
    for name in norm._parameters:
        norm.__dict__.pop(name, None)
