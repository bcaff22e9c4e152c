"""Replace a method of one module, such as `generate`, and restore it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

OwnMethod = Callable[..., Any] | None
"""The method that the instance had before, which the user or a library has set; None is the method of its class."""


def replace_method(module: nn.Module, name: str, function: Callable[..., Any]) -> None:
    """Let ``module.name(...)`` call ``function(module, own, ...)``, if the module has such a method.

    Another attribute of this name stays: a flag, a child, or a method that a wrapper's `__getattr__` finds in a child.
    """
    own: OwnMethod = module.__dict__.get(name)
    if callable(getattr(type(module), name, None) if own is None else own):
        module.__dict__[name] = functools.partial(function, module, own)


def restore_method(module: nn.Module, name: str, function: Callable[..., Any]) -> None:
    """Undo `replace_method`, unless someone has set another method since."""
    current = module.__dict__.get(name)
    if isinstance(current, functools.partial) and current.func is function:
        del module.__dict__[name]
        if (own := current.args[1]) is not None:
            module.__dict__[name] = own


def call_replaced(module: nn.Module, name: str, own: OwnMethod, *args: Any, **kwargs: Any) -> Any:
    """Call the method that `replace_method` has replaced."""
    if own is None:
        return getattr(type(module), name)(module, *args, **kwargs)
    return own(*args, **kwargs)
