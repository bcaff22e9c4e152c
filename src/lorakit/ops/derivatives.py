"""Limits of lorakit's autograd functions: which derivatives they have, and errors for the others.

PyTorch's own errors do not name the function. And its `once_differentiable` returns gradients without a graph where the
incoming gradient is constant, so a second derivative would lack the function's part without an error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lorakit.errors import LorakitError


class Function(torch.autograd.Function):
    """Base of lorakit's autograd functions. Call them with `apply` of this module."""

    instead = "lorakit.models.faster.make_stock(model) restores the model's own layers"
    """What to use where a derivative is not supported; by default, the fix for a function of the faster layers."""


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


def apply(function: type[Function], *args: Any) -> Any:
    """Return ``function.apply(*args)``.

    Raises:
        LorakitError: Under torch.func, or in forward mode.
    """
    if is_transformed(*args):
        raise LorakitError(
            f"{function.__module__} does not support torch.func (grad, vmap, jvp, ...) or forward-mode derivatives. "
            f"Use torch.autograd.grad, or compute without it: {function.instead}."
        )
    return function.apply(*args)


def once_differentiable(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """Decorate the backward pass of a `Function` without a second derivative: computing one raises a LorakitError."""

    @functools.wraps(backward)
    def first(ctx: Any, *grads: Tensor) -> tuple:
        if torch.compiler.is_compiling():  # a compiled backward pass has no second derivative
            return backward(ctx, *grads)
        with torch.no_grad():
            outputs = backward(ctx, *grads)
        if not torch.is_grad_enabled():  # no create_graph
            return outputs
        return tuple(
            None if x is None else _Last.apply(x.detach().requires_grad_(), ctx._forward_cls)
            for x in outputs
        )

    return first


class _Last(torch.autograd.Function):
    """A gradient that cannot be differentiated."""

    @staticmethod
    def forward(ctx, x, function):
        ctx.function = function
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        raise LorakitError(
            f"{ctx.function.__module__} has no second derivative, which a backward pass through a gradient of "
            f"create_graph=True needs. Compute without it: {ctx.function.instead}."
        )
