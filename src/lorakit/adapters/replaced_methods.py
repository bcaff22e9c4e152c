"""Functions in place of methods of transformers and other libraries, for models that carry adapters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from lorakit.adapters.entry import activation_of
from lorakit.adapters.installed import adapted_layers

_REPLACED = "_lorakit_replaced_by"
"""Attribute of a method that is called in place of another one."""

OwnMethod = Callable[..., Any]
"""A method as it was before, bound to its model."""


def replace_methods(kind: type, *functions: Callable[..., Any]) -> None:
    """Let each method of `kind` call the function of its name, for a model of which any part has adapters.

    ``model.name(...)`` calls ``function(model, own, ...)``. A subclass that overrides the method calls it by `super`.
    A method that has been replaced before stays.
    """
    for function in functions:
        own = getattr(kind, function.__name__)
        if getattr(own, _REPLACED, None) is not function:
            setattr(kind, function.__name__, _replaced(own, function))


def replace_in_owner(kind: type, function: Callable[..., Any], library: str = "") -> None:
    """Call `replace_methods` for the class from which `kind` has the method of the function's name.

    Does nothing if `kind` has no such method, or not from `library`.
    """
    owner = next((one for one in kind.__mro__ if function.__name__ in vars(one)), None)
    if owner is not None and owner.__module__.startswith(library):
        replace_methods(owner, function)


def _replaced(own: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def method(model: Any, *args: Any, **kwargs: Any) -> Any:
        if activation_of(model) is None and next(adapted_layers(model), None) is None:
            return own(model, *args, **kwargs)
        return function(model, functools.partial(own, model), *args, **kwargs)

    setattr(method, _REPLACED, function)
    return method
