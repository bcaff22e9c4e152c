"""Configuration dataclasses, held to their own annotations.

The command line and YAML are checked by their parser. In Python nothing holds a field to its
annotation: a rank of "8" or a batch size of 2.5 would fail far from where it was written.
"""

from __future__ import annotations

import functools
import os
import types
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lorakit.errors import ConfigurationError, nearest

_SHOWN = 100
"""Characters of a wrong value that a message repeats."""

_NAMES: dict[Any, tuple[str, str]] = {
    str: ("a text", "texts"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("True or False", "True or False"),
    type(None): ("None", "None"),
}
"""What a message calls one value of a type, and several."""


def conform(config: Any, section: str = "") -> None:
    """Bring every field of a configuration to its annotated type; for its `__post_init__`.

    What means the same is taken: a list for a tuple, a whole number for a number, NumPy's numbers for
    Python's, a path for a text.

    Args:
        config: A dataclass, frozen or not.
        section: Where it stands in a larger configuration, for messages.

    Raises:
        ConfigurationError: A value is of another type, or is none of the choices.
    """
    hints = _hints(type(config))
    for field in fields(config):
        where = f"{section}.{field.name}" if section else field.name
        try:
            value = _fitted(getattr(config, field.name), hints[field.name], where)
        except _Misfit as misfit:
            raise ConfigurationError(str(misfit)) from None
        object.__setattr__(config, field.name, value)


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


class _Misfit(Exception):
    """A value, or one inside it, is not what its annotation says."""

    def __init__(self, where: str, value: object, expected: str, hint: str = "") -> None:
        shown = repr(value)
        shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
        super().__init__(f"{where} is {shown}; it must be {expected}.{hint}")
        self.where = where


def _fitted(value: Any, annotation: Any, where: str) -> Any:
    """The value as its annotation has it."""
    if annotation is Any:
        return value
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return _fitted_to_one(value, args, where)
    if origin is Literal:
        if any(type(value) is type(choice) and value == choice for choice in args):
            return value
        hint = nearest(value, args) if isinstance(value, str) else ""
        raise _Misfit(where, value, _name(annotation), hint)
    if origin in (list, tuple) and isinstance(value, (list, tuple)):
        kinds = args if _is_fixed(annotation) else args[:1] * len(value)
        if len(kinds) != len(value):
            raise _Misfit(where, value, _name(annotation))
        pairs = enumerate(zip(value, kinds, strict=True))
        return origin(_fitted(item, kind, f"{where}[{i}]") for i, (item, kind) in pairs)
    if origin is dict and isinstance(value, Mapping):
        return {
            _fitted(key, args[0], f"a key of {where}"): _fitted(item, args[1], f"{where}[{key!r}]")
            for key, item in value.items()
        }
    if origin is None:
        return _plain(value, annotation, where)
    raise _Misfit(where, value, _name(annotation))


def _plain(value: Any, kind: type, where: str) -> Any:
    if isinstance(value, bool) == (kind is bool):  # Python's bool is an int, ours is not
        if isinstance(value, kind):
            return value
        if kind is int and isinstance(value, Integral):
            return int(value)
        if kind is float and isinstance(value, Real):
            with suppress(OverflowError):
                return float(value)
        if kind is str and isinstance(value, os.PathLike):
            return os.fspath(value)
    raise _Misfit(where, value, _name(kind))


def _fitted_to_one(value: Any, kinds: tuple[Any, ...], where: str) -> Any:
    misfits = []
    for kind in kinds:
        try:
            return _fitted(value, kind, where)
        except _Misfit as misfit:
            misfits.append(misfit)
    innermost = max(misfits, key=lambda misfit: len(misfit.where))
    if innermost.where != where:  # the list is one that could be meant: name what is wrong in it
        raise innermost
    raise _Misfit(where, value, " or ".join(map(_name, kinds)))


def _is_fixed(annotation: Any) -> bool:
    """Whether a list or tuple has as many entries as its annotation."""
    return get_origin(annotation) is tuple and get_args(annotation)[-1] is not ...


def _name(annotation: Any, several: bool = False) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation in _NAMES:
        return _NAMES[annotation][several]
    if origin in (Union, types.UnionType):
        return " or ".join(_name(kind, several) for kind in args)
    if origin is Literal:
        choices = ", ".join(map(str, args))
        return choices if several else f"one of {choices}"
    if origin is dict:
        return f"a mapping of {_name(args[0], True)} to {_name(args[1], True)}"
    if origin in (list, tuple):
        number = f"{len(args)} " if _is_fixed(annotation) else ""
        return f"a list of {number}{_name(args[0], True)}"
    return f"a {annotation.__name__}(...)"
