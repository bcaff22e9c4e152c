"""Classes of the user's own, named in a setting: in a file, or by an installed package under its entry points."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType

from lorakit.errors import ConfigurationError, nearest


def names_a_file(name: str) -> bool:
    """Whether a name is that of a class in a file, `folder/file.py:Class`, or of the file alone."""
    return name.endswith(".py") or name.rpartition(":")[0].endswith(".py")


def installed(group: str) -> dict[str, EntryPoint]:
    """The entry points of a group, by name."""
    return {point.name: point for point in entry_points(group=group)}


def load_installed(point: EntryPoint, what: str) -> object:
    """Return what an entry point leads to.

    Args:
        point: The entry point.
        what: What it stands for, for messages: task or method.

    Raises:
        ConfigurationError: It cannot be imported.
    """
    try:
        return point.load()
    except Exception as error:  # the code of another package may raise anything
        raise ConfigurationError(
            f"The {what} '{point.name}' is {point.value} of an installed package, which cannot be imported "
            f"({type(error).__name__}: {error}). Mend or remove the package."
        ) from error


def load_from_file(name: str, setting: str, fits: Callable[[type], bool]) -> object:
    """Return what `folder/file.py:Class` names. The file is run: it must be one that the user named.

    Args:
        name: The file and the class in it.
        setting: The setting that says so, for messages.
        fits: Tells the classes that could be meant.

    Raises:
        ConfigurationError: There is no such file or class, or the file cannot be imported.
    """
    path, _, class_name = name.rpartition(":")
    if not path.endswith(".py"):
        path, class_name = name, ""
    file = Path(os.path.expanduser(path))
    if not file.is_file():
        raise ConfigurationError(f"{setting} names the file '{path}', and there is none.")
    module = _module(file.resolve(), setting)
    own = [
        found
        for found, value in vars(module).items()
        if inspect.isclass(value) and value.__module__ == module.__name__ and fits(value)
    ]
    if class_name not in vars(module):
        asked = f"no '{class_name}' in it" if class_name else "no class is named after it"
        raise ConfigurationError(
            f"{setting} names the file '{path}', and {asked}; write {path}:Class. What it has: "
            f"{', '.join(own) or 'none'}.{nearest(class_name, own)}"
        )
    return vars(module)[class_name]


def _module(file: Path, setting: str) -> ModuleType:
    """The module in a file, imported once for each content, so that a class stays one and the same."""
    digest = hashlib.sha256(bytes(file) + file.read_bytes()).hexdigest()
    name = f"lorakit_own_{digest[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a user's code may raise anything
        del sys.modules[name]
        raise ConfigurationError(
            f"{setting}: the file '{file}' cannot be imported ({type(error).__name__}: {error}). Mend it."
        ) from error
    return module
