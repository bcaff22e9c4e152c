"""Every method by the name under which files and configurations know it: lorakit's, and those of users."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, TypeGuard

from lorakit.errors import ConfigurationError, nearest
from lorakit.extensions import installed, load_from_file, load_installed, names_a_file
from lorakit.methods.bitfit import BitFit
from lorakit.methods.bottleneck import BottleneckAdapter
from lorakit.methods.combined import Combined
from lorakit.methods.full import FullFineTuning
from lorakit.methods.lora import LoRA
from lorakit.methods.method import Method
from lorakit.methods.prefix import PrefixEmbedding, PrefixLayer

METHODS: dict[str, type[Method]] = {
    kind.__name__: kind
    for kind in (
        *(BitFit, BottleneckAdapter, Combined, FullFineTuning),
        *(LoRA, PrefixEmbedding, PrefixLayer),
    )
}
"""Every method that comes with lorakit, by the name under which a file records it."""

ENTRY_POINTS = "lorakit.methods"
"""The group of entry points under which an installed package names its methods."""

DEFAULT_RATE = 5e-4
"""Peak learning rate of a method of one's own that has no `default_rate`."""

_OWN: dict[str, type[Method]] = {}


def use_method(method: str | type[Method]) -> type[Method]:
    """Make a method of your own known, so that its adapters can be loaded; return its class.

    Adapter files record a method by its class's name alone, and nothing that a file names is ever imported: what
    runs is what you name here, or have installed.

    Args:
        method: The class, or where it is: ``folder/file.py:Class``, which is run, or the name of an entry point in
            the group ``lorakit.methods`` of an installed package.

    Raises:
        ConfigurationError: There is no such method, or it is none.
    """
    found = _found(method) if isinstance(method, str) else method
    kind = _checked(found, method if isinstance(method, str) else repr(method))
    _OWN[kind.__name__] = kind
    return kind


def own_method(name: str, settings: Mapping[str, Any]) -> Method:
    """Return a method of the user's own with `settings`.

    Raises:
        ConfigurationError: There is no such method, or it has no such setting.
    """
    kind = use_method(name)
    known = [field.name for field in dataclasses.fields(kind) if field.init]  # type: ignore[arg-type]
    for setting in settings:
        if setting not in known:
            raise ConfigurationError(
                f"method_settings has {setting!r}, and {kind.__name__} has the settings {', '.join(known) or 'none'}."
                + nearest(setting, known)
            )
    try:
        return kind(**settings)
    except TypeError as error:
        raise ConfigurationError(f"method_settings do not fit {kind.__name__}: {error}.") from error


def recorded_method(name: object) -> type[Method] | None:
    """Return the method whose class has the name that an adapter's file records; None where none is known."""
    if not isinstance(name, str):
        return None
    if name in METHODS or name in _OWN:
        return METHODS.get(name) or _OWN[name]
    point = next((p for p in installed(ENTRY_POINTS).values() if p.attr == name), None)
    return None if point is None else use_method(point.name)


def is_own(name: str) -> bool:
    """Whether a configuration's name of a method is one of the user's: a file's or an installed package's."""
    return names_a_file(name) or name in installed(ENTRY_POINTS)


def _found(name: str) -> object:
    if names_a_file(name):
        return load_from_file(name, "method", _is_method)
    points = installed(ENTRY_POINTS)
    if name in points:
        return load_installed(points[name], "method")
    raise ConfigurationError(
        f"There is no method {name!r} of yours: write a class in a file, path/to/file.py:Class, or the name of an "
        f"entry point in the group {ENTRY_POINTS} ({', '.join(points) or 'there are none'})."
    )


def _is_method(found: object) -> TypeGuard[type[Method]]:
    return (
        inspect.isclass(found)
        and dataclasses.is_dataclass(found)
        and all(callable(getattr(found, name, None)) for name in ("modules", "trained_parameters"))
    )


def _checked(found: object, name: str) -> type[Method]:
    if not _is_method(found):
        raise ConfigurationError(
            f"method is {name}, which is {found!r:.80}; a method is a frozen dataclass with the functions modules and "
            "trained_parameters (see lorakit.methods.Method)."
        )
    if found.__name__ in METHODS:
        raise ConfigurationError(
            f"method is {name}, and a method of lorakit is called {found.__name__}. Give the class another name."
        )
    return found
