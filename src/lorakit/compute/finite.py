"""Reject a model whose output is NaN, and name the cause."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorakit.errors import BaseModelError
from lorakit.formatting import listed


def refuse_nan(model: nn.Module, output: Tensor) -> None:
    """Raise a BaseModelError that names the cause if a model's output holds NaN."""
    if output.isnan().any():  # some models set the logits of unused tokens to minus infinity
        raise BaseModelError(f"The model's output is NaN: {why_not_finite(model)}")


def why_not_finite(model: nn.Module) -> str:
    """Return why a model's output is not finite, and what to do, as the end of a sentence."""
    weights = ((name, p) for name, p in model.named_parameters() if p.is_floating_point())
    if broken := [f"'{name}'" for name, p in weights if not p.detach().isfinite().all()]:
        return (
            f"the weight {listed(broken, 1)} holds NaN or infinity. Download or save the model again, or use another "
            "base."
        )
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if dtype == torch.float16:
        return "the activations overflow in float16. Set base.dtype float32."
    # bfloat16 has the range of float32.
    return "all weights are finite, but an activation overflows. Use another base or adapter."
