"""Norms with a trained parameter in float32 and a frozen one in the base's dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorakit.models.layers import by_token
from lorakit.models.parameter_swaps import hide_parameters, show_parameters


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
    hide_parameters(norm, _in_float32)


@by_token
def _narrow(norm: nn.Module, args: Any, output: Any) -> None:
    show_parameters(norm)


def _in_float32(norm: nn.Module) -> dict[str, Tensor]:
    """Return the frozen parameters of a norm in float32."""
    parameters = norm._parameters.items()
    return {
        name: p.to(torch.float32) for name, p in parameters if p is not None and not p.requires_grad
    }
