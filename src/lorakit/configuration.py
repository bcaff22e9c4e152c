"""Type checks for configuration dataclasses, the same for Python, YAML and the command line.

Python does not check annotations: a rank of "8" or a batch size of 2.5 would fail far from where it was written.
"""

from __future__ import annotations

import functools
import os
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from numbers import Integral, Real
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from lorakit.errors import ConfigurationError, nearest
from lorakit.other_names import OTHER_NAMES

Config = TypeVar("Config")

LocalPath = Annotated[str, "path"]
"""Type of a setting that names a file or folder. A leading ``~`` is expanded: a shell leaves it in `--output=~/run`."""

_SHOWN = 100
"""Longest excerpt of a wrong value in a message, in characters."""

LARGEST_NUMBER = 3.4e38
"""Largest number: tensors in float32 hold no larger one."""
LARGEST_WHOLE_NUMBER = 2**63 - 1
"""Largest whole number: tensors and files hold no larger one."""

Names = Mapping[Any, tuple[str, str]]
"""The name of each type in messages, singular and plural."""

PYTHON: Names = {
    str: ("a string", "strings"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("True or False", "True or False"),
    type(None): ("None", "None"),
}
YAML: Names = {
    **PYTHON,
    bool: ("true or false", "true or false"),
    type(None): ("null", "null"),
}


def as_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as dicts, lists and scalars, for YAML and JSON."""
    return _plain(asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one mapping, by dotted name."""
    values: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            values |= flat_settings(value, f"{prefix}{name}.")
        else:
            values[f"{prefix}{name}"] = value
    return values


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by dotted name as the arguments of a configuration, each section a dictionary."""
    arguments: dict[str, Any] = {}
    for name, value in settings.items():
        section, dot, key = name.partition(".")
        if dot:
            arguments.setdefault(section, {})[key] = value
        else:
            arguments[name] = value
    return arguments


def setting(settings: Mapping[str, Any], name: str) -> Any:
    """Return the value of a dotted name in nested settings, or None if it is not set."""
    value: Any = settings
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def default_of(field: Field[Any]) -> Any:
    """Return the default of a field; MISSING if it is required."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def changed(config: Any) -> dict[str, Any]:
    """Return the settings of a configuration that differ from their defaults, by name."""
    values = ((field, getattr(config, field.name)) for field in fields(config))
    return {field.name: value for field, value in values if value != default_of(field)}


def conform(config: Any, section: str = "") -> None:
    """Convert every field of a configuration to its annotated type. Call it in `__post_init__`.

    Equivalent values are converted: a list to a tuple, a whole number to a float, NumPy's numbers to
    Python's, a path to a string, a mapping to a section. The ``~`` of a `LocalPath` is expanded.

    Args:
        config: A dataclass, frozen or not.
        section: Its section in a larger configuration, for messages.

    Raises:
        ConfigurationError: A value has another type, or is not one of the choices.
    """
    hints = hints_with_paths(type(config))
    for field in fields(config):
        path = f"{section}.{field.name}" if section else field.name
        value = converted(getattr(config, field.name), hints[field.name], path)
        object.__setattr__(config, field.name, value)


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return name, earlier value and present value of each setting that differs, by name; None is not set."""
    return [
        (name, then.get(name), now.get(name))
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    ]


def converted(value: Any, annotation: Any, path: str, names: Names = PYTHON) -> Any:
    """Return a value as its annotated type.

    Args:
        value: The value of a setting.
        annotation: The type of the setting.
        path: The setting's name, for messages.
        names: Names of types in messages: those of Python or of YAML.

    Raises:
        ConfigurationError: The value has another type, or is not one of the choices.
    """
    try:
        return _convert(value, annotation, path)
    except _WrongType as error:
        raise ConfigurationError(error.message(names)) from None


hints_of = functools.cache(get_type_hints)
"""Returns the types of the fields of a dataclass, by name."""
hints_with_paths = functools.cache(functools.partial(get_type_hints, include_extras=True))
"""Returns the same types, in which `LocalPath` is not `str`."""


class _WrongType(Exception):
    """A value, or an item inside it, does not have its annotated type."""

    def __init__(self, path: str, value: object, annotation: Any) -> None:
        super().__init__(path)
        self.path, self.value, self.annotation = path, value, annotation

    def message(self, names: Names) -> str:
        """Return the problem and the expected type as a sentence."""
        shown = _shown(self.value)
        if names is YAML and (self.value is None or isinstance(self.value, bool)):
            shown = "null" if self.value is None else shown.lower()
        choices = get_args(self.annotation) if get_origin(self.annotation) is Literal else ()
        hint = nearest(self.value, choices) if isinstance(self.value, str) else ""
        return f"{self.path} is {shown}; it must be {type_name(self.annotation, names)}.{hint}"


class _OutOfRange(_WrongType):
    """A number is too large, or not finite."""

    def message(self, names: Names) -> str:
        largest = LARGEST_WHOLE_NUMBER if self.annotation is int else LARGEST_NUMBER
        kind = names[self.annotation][0].replace("a number", "a finite number")
        return f"{self.path} is {_shown(self.value)}; it must be {kind} of at most {largest:,} in size."


def _shown(value: object) -> str:
    """Return the first characters of a value in a message."""
    try:
        shown = repr(value)
    except ValueError:  # Python refuses to print an int of thousands of digits
        return "a number of thousands of digits"
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."


def is_finite(value: object) -> bool:
    """Return whether a value is a number that a float32 tensor can hold. Never raises, unlike math.isfinite."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    return abs(cast(float, value)) <= LARGEST_NUMBER


def is_whole(value: object) -> bool:
    """Return whether a value is a whole number, Python's or NumPy's, and no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _convert(value: Any, annotation: Any, path: str) -> Any:
    """Convert a value to its annotated type, or raise _WrongType."""
    if annotation is Any:
        return value
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return os.path.expanduser(_convert(value, args[0], path))
    if origin in (Union, types.UnionType):
        return _convert_to_any(value, annotation, path)
    if origin is Literal:
        if any(type(value) is type(choice) and value == choice for choice in args):
            return value
        raise _WrongType(path, value, annotation)
    if origin in (list, tuple) and isinstance(value, (list, tuple)):
        kinds = args if _is_fixed(annotation) else args[:1] * len(value)
        if len(kinds) != len(value):
            raise _WrongType(path, value, annotation)
        pairs = enumerate(zip(value, kinds, strict=True))
        return origin(_convert(item, kind, f"{path}[{i}]") for i, (item, kind) in pairs)
    if origin is dict and isinstance(value, Mapping):
        return {
            _convert(key, args[0], f"a key of {path}"): _convert(item, args[1], f"{path}[{key!r}]")
            for key, item in value.items()
        }
    if origin is None:
        return _convert_scalar(_built(value, annotation, path), annotation, path)
    raise _WrongType(path, value, annotation)


def _convert_scalar(value: Any, kind: type, path: str) -> Any:
    if isinstance(value, bool) == (kind is bool):  # in Python a bool is an int
        if kind is int and isinstance(value, Integral):
            if abs(int(value)) > LARGEST_WHOLE_NUMBER:
                raise _OutOfRange(path, value, kind)
            return int(value)
        if kind is float and isinstance(value, Real):
            if not is_finite(value):
                raise _OutOfRange(path, value, kind)
            return float(value)
        if isinstance(value, kind):
            return value
        if kind is str and isinstance(value, os.PathLike):
            return os.fspath(value)
    raise _WrongType(path, value, kind)


def _convert_to_any(value: Any, union: Any, path: str) -> Any:
    errors = []
    for kind in get_args(union):
        try:
            return _convert(value, kind, path)
        except _OutOfRange:
            raise  # the type is right
        except _WrongType as error:
            errors.append(error)
    innermost = max(errors, key=lambda error: len(error.path))
    if innermost.path != path:  # only an item has the wrong type: report the item
        raise innermost
    raise _WrongType(path, value, union)


def _is_fixed(annotation: Any) -> bool:
    """Whether the annotation is a tuple of fixed length."""
    return get_origin(annotation) is tuple and get_args(annotation)[-1] is not ...


def type_name(annotation: Any, names: Names = PYTHON, several: bool = False) -> str:
    """Return a type in words, such as "a whole number" or "one of none, all"; `several` gives the plural."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_name(args[0], names, several)
    if annotation in names:
        return names[annotation][several]
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_name(kind, names, several) for kind in args))
    if origin is Literal:
        choices = ", ".join(map(str, args))
        return choices if several else f"one of {choices}"
    if annotation is Any:
        return "values" if several else "any value"
    if origin is dict:
        keys, values = (type_name(kind, names, True) for kind in args)
        return f"a mapping from {keys} to {values}"
    if origin in (list, tuple):
        number = f"{len(args)} " if _is_fixed(annotation) else ""
        return f"a list of {number}{type_name(args[0], names, True)}"
    return "a group of options" if names is YAML else f"{annotation.__name__}(...)"


def strict(config: type[Config]) -> type[Config]:
    """Decorate a dataclass: an unknown or a missing setting is a ConfigurationError that names what to write."""
    initialise = config.__init__

    @functools.wraps(initialise)
    def checked(self: Any, *args: Any, **settings: Any) -> None:
        if not args:  # the dataclass itself rejects positional arguments
            _check_names(config, settings, config.__name__)
        initialise(self, *args, **settings)

    config.__init__ = checked
    return config


def _built(value: Any, kind: Any, path: str) -> Any:
    """Return the section that a mapping of its settings describes; other values unchanged.

    A section with a `shorthand`, the name of a setting, may also be the text or path of that setting.
    """
    if isinstance(value, (str, os.PathLike)) and hasattr(kind, "shorthand"):
        value = {kind.shorthand: value}
    if not isinstance(value, Mapping) or not hasattr(kind, "__dataclass_fields__"):
        return value
    _check_names(kind, value, path)
    return kind(**value)


def _check_names(config: Any, settings: Mapping[str, Any], path: str) -> None:
    """Raise a ConfigurationError unless `settings` has known names only, and all that are required."""
    known = {field.name: field for field in fields(config)}
    for name in settings:
        if name not in known:
            raise ConfigurationError(f"{path} has no setting {name!r}.{_instead(str(name), known)}")
    required = [n for n, f in known.items() if f.default is f.default_factory is MISSING]
    if missing := [name for name in required if name not in settings]:
        raise ConfigurationError(f"{path} needs {', '.join(missing)}; set {missing[0]}=...")


def _instead(name: str, known: Mapping[str, Field]) -> str:
    """Return a sentence with the setting to write instead of an unknown one, or an empty string."""
    section, _, ours = OTHER_NAMES.get(name, "").rpartition(".")
    if ours in known and section not in known:  # evaluation.batch_size is not batch_size
        return f" Its name in lorakit is '{ours}'."
    if not ours:
        kinds = {key: field.default_factory for key, field in known.items()}
        having = [k for k, kind in kinds.items() if is_dataclass(kind) and name in hints_of(kind)]
        section, ours = (having[0], name) if having else ("", "")
    if section in known:
        return f" Its name in lorakit is {section}.{ours}: write {section}=dict({ours}=...)."
    return nearest(name, known)
