"""User-defined classes, loaded from a Python file or from the entry points of an installed package."""

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

from lorakit import storage
from lorakit.errors import ConfigurationError, nearest


def names_a_file(name: str) -> bool:
    """Whether a name has the form `folder/file.py:Class` or `folder/file.py`."""
    return name.endswith(".py") or name.rpartition(":")[0].endswith(".py")


def file_of(name: str) -> Path | None:
    """Return the file of a class `folder/file.py:Class`; None for other names."""
    path, _, _ = name.rpartition(":")
    return Path(path).expanduser() if path.endswith(".py") else None


def installed(group: str) -> dict[str, EntryPoint]:
    """Return the entry points of a group by name."""
    return {point.name: point for point in entry_points(group=group)}


def load_installed(point: EntryPoint, kind: str) -> object:
    """Return the object of an entry point; `kind` is "task" or "method", for messages.

    Raises:
        ConfigurationError: The object cannot be imported.
    """
    try:
        return point.load()
    except Exception as error:  # the code of another package may raise anything
        raise ConfigurationError(
            f"The {kind} '{point.name}' is {point.value} of an installed package, which cannot be imported "
            f"({type(error).__name__}: {error}). Fix or remove the package."
        ) from error


def load_from_file(name: str, setting: str, fits: Callable[[type], bool]) -> object:
    """Return the class of a name such as `folder/file.py:Class`.

    This runs the file: pass only names that the user wrote.

    Args:
        name: The file and the class in it.
        setting: The setting that holds the name, for messages.
        fits: Whether a message should suggest a class.

    Raises:
        ConfigurationError: The file or the class does not exist, or the file cannot be imported.
    """
    path, _, class_name = name.rpartition(":")
    if not path.endswith(".py"):
        path, class_name = name, ""
    file = Path(os.path.expanduser(path))
    if not file.is_file():
        raise ConfigurationError(f"{setting} names the file '{path}', which does not exist.")
    module = _module(file.resolve(), setting)
    classes = [
        key
        for key, value in vars(module).items()
        if inspect.isclass(value) and value.__module__ == module.__name__ and fits(value)
    ]
    if class_name not in vars(module):
        problem = f"which has no '{class_name}'" if class_name else "but no class in it"
        raise ConfigurationError(
            f"{setting} names the file '{path}', {problem}. Write {path}:Class. Its classes: "
            f"{', '.join(classes) or 'none'}.{nearest(class_name, classes)}"
        )
    return vars(module)[class_name]


def _module(file: Path, setting: str) -> ModuleType:
    """Import a file as a module, once per content, so that its classes keep their identity."""
    with storage.reading(file, ConfigurationError):
        digest = hashlib.sha256(bytes(file) + file.read_bytes()).hexdigest()
    name = f"lorakit_own_{digest[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look up the module here
    try:
        spec.loader.exec_module(module)
    except (
        Exception,
        SystemExit,
    ) as error:  # a user's code may raise anything, and end the process
        del sys.modules[name]
        raise ConfigurationError(
            f"{setting}: the file '{file}' cannot be imported ({type(error).__name__}: {error}). Fix the file."
        ) from error
    return module
