"""Derivatives of lorakit's autograd functions: which transforms are active, and an error for a second derivative.

PyTorch itself reports an autograd function that torch.func or forward mode cannot transform.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lorakit.errors import LorakitError


def is_transformed(*tensors: Any) -> bool:
    """Return whether a transform of torch.func is active, or a tensor has a derivative in forward mode."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():
        return True
    return forward_ad._current_level >= 0 and any(
        isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None
        for tensor in tensors
    )


def once_differentiable(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """Decorate a backward pass that cannot be differentiated: with create_graph=True it raises a LorakitError.

    PyTorch's decorator of this name returns gradients without a graph where the incoming gradient is constant. A second
    derivative would then lack the function's part without an error.
    """

    @functools.wraps(backward)
    def first(ctx: Any, *grads: Tensor) -> tuple:
        # A compiled backward pass is traced with gradients on, and has no second derivative.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise LorakitError(
                f"{ctx._forward_cls.__module__} has no second derivative, which create_graph=True needs. Compute "
                "without it: lorakit.models.faster.make_stock(model) restores the model's own layers. For a loss, use "
                "the model's own."
            )
        return backward(ctx, *grads)

    return first
