"""The options of a command: the fields of its configuration class, by dotted name."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

from lorakit.configuration import YAML, converted, default_of, hints_of, hints_with_paths
from lorakit.errors import ConfigurationError
from lorakit.file_names import CONFIG
from lorakit.formatting import resume_command

Config = TypeVar("Config")


@dataclass(frozen=True)
class Option:
    """A field that takes a value. A field that is itself a configuration is a section, see `sections_of`."""

    name: str
    """Dotted name, such as lora.rank."""
    annotation: Any
    default: Any
    """MISSING without one."""
    text: str
    """Help text: the string under the field."""

    @property
    def kinds(self) -> tuple[Any, ...]:
        """The types of a union; otherwise the only type."""
        return _kinds(self.annotation)

    @property
    def takes_list(self) -> bool:
        return any(get_origin(kind) in (list, tuple) for kind in self.kinds)

    @property
    def takes_mapping(self) -> bool:
        return any(get_origin(kind) is dict for kind in self.kinds)


@functools.cache
def options_of(config_class: type) -> dict[str, Option]:
    """Return every option of a configuration class, also those of its sections, by dotted name."""
    return {name: found for name, found in _members(config_class) if isinstance(found, Option)}


@functools.cache
def sections_of(config_class: type) -> dict[str, type]:
    """Return the configuration class of every section, by dotted name."""
    return {name: found for name, found in _members(config_class) if isinstance(found, type)}


def build(config_class: type[Config], values: Mapping[str, Any]) -> Config:
    """Return a configuration with `values`, by dotted name. Other fields keep their defaults.

    Raises:
        ConfigurationError: A required option is absent, or a value is invalid.
    """
    for name in sections_of(config_class):
        if name in values:  # a text or a list; the settings of a mapping have dotted names
            first = next(
                option for option in options_of(config_class) if option.startswith(f"{name}.")
            )
            raise ConfigurationError(
                f"{name} is {values[name]!r:.100}; it must be a group of options, for example {name}: "
                f"{{{first.removeprefix(f'{name}.')}: VALUE}}."
            )
    if missing := missing_options(config_class, values):
        section = missing[0].rpartition(".")[0]
        if section and _inside(section, values):
            raise ConfigurationError(
                f"Options of {section} require {missing[0]}. Add --{missing[0]}, or remove all --{section} options."
            )
        if (run := _run_to_resume(values)) is not None:
            raise ConfigurationError(
                f"{run} is a run, whose config.yaml has its settings. Resume it: {resume_command(run)}"
            )
        raise ConfigurationError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set. "
            f"Add {' and '.join(f'--{name} VALUE' for name in missing)}. --help lists the options."
        )
    return _build(config_class, values, "", None)


def _run_to_resume(values: Mapping[str, Any]) -> Path | None:
    """Return the folder of the run that --resume is for: `output`, or the value after --resume, as Trainer has it."""
    if "resume" not in values:
        return None
    folders = [Path(str(values[name])) for name in ("output", "resume") if name in values]
    return next((folder for folder in folders if (folder / CONFIG).is_file()), None)


def _build(config_class: type[Config], values: Mapping[str, Any], prefix: str, base: Any) -> Config:
    """Build a section from its options, which start with `prefix`; unset ones have the values of `base`."""
    settings = {}
    for field, annotation in _fields(config_class):
        name = prefix + field.name
        section = _section(annotation)
        is_required = default_of(field) is MISSING  # of its options only those in `values` are set
        if section is not None and (is_required or _inside(name, values)):
            settings[field.name] = _build(section, values, f"{name}.", default_of(field))
        elif name in values:
            settings[field.name] = converted(values[name], annotation, name, YAML)
    if dataclasses.is_dataclass(base) and not isinstance(base, type):
        return dataclasses.replace(base, **settings)  # type: ignore[return-value]
    return config_class(**settings)


def missing_options(config_class: type, values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the required options that `values` does not have."""
    missing = []
    for field, annotation in _fields(config_class):
        name = prefix + field.name
        default = default_of(field)
        section = _section(annotation)
        if section is None:
            missing += [name] if default is MISSING and name not in values else []
        elif default is MISSING or (default is None and _inside(name, values)):
            missing += missing_options(section, values, f"{name}.")
            main = f"{name}.{getattr(section, 'shorthand', '')}"  # what a required section is about: a base's name
            if default is MISSING and hasattr(section, "shorthand") and main not in values:
                missing += [main] if main not in missing else []
    return missing


def _members(
    config_class: type, prefix: str = "", base: Any = MISSING
) -> Iterator[tuple[str, Option | type]]:
    """Yield the options and the classes of the sections by dotted name; `base` has the options' defaults."""
    texts = _texts(config_class)
    for field, annotation in _fields(config_class):
        name, default = prefix + field.name, getattr(base, field.name, default_of(field))
        if (section := _section(annotation)) is not None:
            yield name, section
            yield from _members(section, f"{name}.", default)
        else:
            plain = hints_of(config_class)[field.name]
            yield name, Option(name, plain, default, texts.get(field.name, ""))


def _fields(config_class: type) -> list[tuple[dataclasses.Field[Any], Any]]:
    hints = hints_with_paths(config_class)
    return [(field, hints[field.name]) for field in dataclasses.fields(config_class)]


def _kinds(annotation: Any) -> tuple[Any, ...]:
    union = get_origin(annotation) in (Union, types.UnionType)
    return get_args(annotation) if union else (annotation,)


def _section(annotation: Any) -> type | None:
    """Return the configuration class of a section; None for other fields."""
    return next((kind for kind in _kinds(annotation) if dataclasses.is_dataclass(kind)), None)  # type: ignore[return-value]


def _inside(section: str, values: Mapping[str, Any]) -> bool:
    return any(name.startswith(f"{section}.") for name in values)


def _texts(config_class: type) -> dict[str, str]:
    """Return the string under each field, also of base classes."""
    texts: dict[str, str] = {}
    for owner in reversed(config_class.__mro__):
        if dataclasses.is_dataclass(owner):
            texts.update(_module_texts(owner.__module__).get(owner.__name__, {}))
    return texts


@functools.cache
def _module_texts(module: str) -> dict[str, dict[str, str]]:
    """Return the strings under the fields of each class of a module."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return {node.name: dict(_strings_under_fields(node)) for node in classes}


def _strings_under_fields(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for statements in pairwise(node.body):
        match statements:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=text)):
                yield name, " ".join(str(text).split())
