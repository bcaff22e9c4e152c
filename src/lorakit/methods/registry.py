"""All methods by the name in files and configurations: those of lorakit and those of users."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, TypeGuard

from lorakit.errors import ConfigurationError, nearest
from lorakit.extensions import installed, load_from_file, load_installed, names_a_file
from lorakit.methods.bitfit import BitFit
from lorakit.methods.bottleneck import BottleneckAdapter
from lorakit.methods.combined import Combined, parts
from lorakit.methods.full import FullFineTuning
from lorakit.methods.lora import LoRA
from lorakit.methods.method import Method
from lorakit.methods.prefix import PrefixEmbedding, PrefixLayer

SECTIONS: dict[str, type[Method]] = {
    "lora": LoRA,
    "full": FullFineTuning,
    "bitfit": BitFit,
    "bottleneck": BottleneckAdapter,
    "prefix_embedding": PrefixEmbedding,
    "prefix_layer": PrefixLayer,
}
"""The methods of lorakit, by the name in a configuration, which has a section for each of them."""

METHODS: dict[str, type[Method]] = {cls.__name__: cls for cls in (*SECTIONS.values(), Combined)}
"""The methods of lorakit, by the name that files record."""

ENTRY_POINTS = "lorakit.methods"
"""The entry point group in which an installed package declares its methods."""

DEFAULT_RATE = 5e-4
"""Peak learning rate of a user's method without `default_rate`."""

_OWN: dict[str, type[Method]] = {}
"""Methods of users that `use_method` has registered, by class name."""


def unused_settings(config: Mapping[str, Any]) -> list[str]:
    """Return the options and sections of a configuration that have no effect with its method.

    `from_adapter` brings a method with its settings; then `method` only locates a class of the user's own.
    """
    names = str(config.get("method", "lora")).split("+")
    is_own = not set(names) <= set(SECTIONS)
    if config.get("from_adapter") is not None:
        return [*([] if is_own else ["method"]), *SECTIONS, "method_settings"]
    unused = [section for section in SECTIONS if section not in names]
    return unused if is_own else [*unused, "method_settings"]


def default_rate(method: Method) -> float:
    """Return the default peak learning rate of a method: the lowest of its parts, so that it is too high for none."""
    return min(getattr(part, "default_rate", DEFAULT_RATE) for part in parts(method))


def use_method(method: str | type[Method]) -> type[Method]:
    """Register a method of yours, so that its adapters can be loaded; return its class.

    Adapter files record only the name of a method's class, and lorakit never imports code that a file names. It
    runs only methods that you register here or have installed.

    Args:
        method: The class, or its location: ``folder/file.py:Class``, which is run, or the name of an entry point in
            the group ``lorakit.methods`` of an installed package.

    Raises:
        ConfigurationError: The method does not exist, or is not a method class.
    """
    name = method if isinstance(method, str) else repr(method)
    method_class = _load(method) if isinstance(method, str) else method
    if not _is_method(method_class):
        raise ConfigurationError(
            f"method is {name}, which is {method_class!r:.80}; a method is a frozen dataclass with the functions "
            "modules and trained_parameters (see lorakit.methods.Method)."
        )
    if method_class.__name__ in METHODS:
        raise ConfigurationError(
            f"method is {name}, and a method of lorakit is called {method_class.__name__}. Give the class another name."
        )
    _OWN[method_class.__name__] = method_class
    return method_class


def user_method(name: str, settings: Mapping[str, Any]) -> Method:
    """Return a user's method with `settings`.

    Raises:
        ConfigurationError: The method does not exist, or has no such setting.
    """
    method_class = use_method(name)
    known = [field.name for field in dataclasses.fields(method_class) if field.init]  # type: ignore[arg-type]
    for setting in settings:
        if setting not in known:
            raise ConfigurationError(
                f"method_settings has {setting!r}, and {method_class.__name__} has the settings "
                f"{', '.join(known) or 'none'}." + nearest(setting, known)
            )
    try:
        return method_class(**settings)
    except TypeError as error:
        raise ConfigurationError(
            f"method_settings do not fit {method_class.__name__}: {error}."
        ) from error


def recorded_method(name: object) -> type[Method] | None:
    """Return the method class of the name that an adapter's file records; None if it is unknown."""
    if not isinstance(name, str):
        return None
    if method_class := METHODS.get(name) or _OWN.get(name):
        return method_class
    # A file records the class's name, an installed package registers it under any name.
    point = next((p for p in installed(ENTRY_POINTS).values() if p.attr == name), None)
    return None if point is None else use_method(point.name)


def is_user_method(name: str) -> bool:
    """Return whether a configured method name refers to a user's method: a file or an installed package."""
    return names_a_file(name) or name in installed(ENTRY_POINTS)


def _load(name: str) -> object:
    """Load a method class from `file.py:Class` or by the name of an entry point."""
    if names_a_file(name):
        return load_from_file(name, "method", _is_method)
    points = installed(ENTRY_POINTS)
    if name in points:
        return load_installed(points[name], "method")
    raise ConfigurationError(
        f"There is no method {name!r} of yours: give a class in a file, path/to/file.py:Class, or the name of an entry "
        f"point in the group {ENTRY_POINTS} ({', '.join(points) or 'none is installed'})."
    )


def _is_method(value: object) -> TypeGuard[type[Method]]:
    return (
        inspect.isclass(value)
        and dataclasses.is_dataclass(value)
        and all(callable(getattr(value, name, None)) for name in ("modules", "trained_parameters"))
    )
