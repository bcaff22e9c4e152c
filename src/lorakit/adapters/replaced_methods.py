"""Functions in place of methods of transformers and other libraries, for models that carry adapters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from lorakit.adapters.entry import activation_of
from lorakit.adapters.installed import adapted_layers
from lorakit.errors import AdapterStateError

_REPLACED = "_lorakit_replaced_by"
"""Attribute of a method that is called in place of another one."""

OwnMethod = Callable[..., Any]
"""A method as it was before, bound to its model."""


def replace_method(kind: type, name: str, function: Callable[..., Any]) -> None:
    """Let a method of `kind` call a function, for a model of which any part has adapters.

    ``model.name(...)`` calls ``function(model, own, ...)``. A subclass that overrides the method calls it by `super`.
    A method that has been replaced before stays.
    """
    own = getattr(kind, name)
    if getattr(own, _REPLACED, None) is function:
        return

    @functools.wraps(own)
    def method(model: Any, *args: Any, **kwargs: Any) -> Any:
        if activation_of(model) is None and next(adapted_layers(model), None) is None:
            return own(model, *args, **kwargs)
        return function(model, functools.partial(own, model), *args, **kwargs)

    setattr(method, _REPLACED, function)
    setattr(kind, name, method)


def replace_in_owner(
    kind: type, name: str, function: Callable[..., Any], library: str = ""
) -> None:
    """Call `replace_method` for the class from which `kind` has the method.

    Does nothing if `kind` has no such method, or not from `library`.
    """
    owner = next((one for one in kind.__mro__ if name in vars(one)), None)
    if owner is not None and owner.__module__.startswith(library):
        replace_method(owner, name, function)


# --- methods that would silently change what the adapters compute ----------------------------------


def cast(model: nn.Module, own: OwnMethod, *args: Any) -> Any:
    """Cast a model by its own `half` or `float`.

    transformers rejects this for a quantised model by the flag `is_quantized`, which is cleared while the model has
    adapters (`lorakit.models.quantised.allow_training`).

    Raises:
        AdapterStateError: transformers has quantised the model.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        raise AdapterStateError(
            "A quantised model cannot be cast to another dtype: its layers would compute with wrong numbers. Load it "
            "in this dtype: from_pretrained(..., dtype=...)."
        )
    return own(*args)


def fuse_qkv_projections(model: nn.Module, own: OwnMethod) -> Any:
    """Reject the fusion of layers, which copies the base's weights and never calls the adapted layers again."""
    raise AdapterStateError(
        "fuse_qkv_projections() would copy the weights of the base into new layers, without the adapters. Call "
        "merge(keep_base=False) first."
    )
