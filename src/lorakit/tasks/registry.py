"""Every task by its name: the ones that come with lorakit, those of other packages, and those in files."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import os
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType

from lorakit.errors import ConfigurationError, nearest
from lorakit.tasks.chat import Chat
from lorakit.tasks.classification import Classification, Regression
from lorakit.tasks.data_to_text import DATA_TO_TEXT
from lorakit.tasks.glue import GLUE
from lorakit.tasks.language_modelling import Completion
from lorakit.tasks.summarization import SAMSum
from lorakit.tasks.task import Task
from lorakit.tasks.text_to_sql import WikiSQL

GENERIC: dict[str, type[Task]] = {
    task.name: task for task in (Completion, Chat, Classification, Regression)
}
"""Tasks that read any data with their columns."""

NAMED: tuple[type[Task], ...] = (*GLUE, *DATA_TO_TEXT, WikiSQL, SAMSum)
"""Tasks that know their data: those of the paper."""

TASKS: dict[str, type[Task]] = {**GENERIC, **{task.name: task for task in NAMED}}
"""Every task that comes with lorakit."""

ENTRY_POINTS = "lorakit.tasks"
"""The group of entry points under which an installed package names its tasks."""


def generic_task(task: type[Task]) -> type[Task]:
    """Return the generic task that reads what `task` reads: the one it is, or inherits from."""
    return next((g for g in GENERIC.values() if issubclass(task, g)), GENERIC["completion"])


def task_type(name: str) -> type[Task]:
    """Return the task that a configuration calls `name`.

    Args:
        name: A task of lorakit, one that an installed package names under the entry points `lorakit.tasks`, or a
            class in a file: `folder/file.py:Class`.

    Raises:
        ConfigurationError: There is no such task, or what is there is none.
    """
    if name in TASKS:
        return TASKS[name]
    path, _, class_name = name.rpartition(":")
    if path.endswith(".py") or name.endswith(".py"):
        return _checked(_in_file(path or name, class_name if path else ""), name)
    installed = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if name in installed:
        return _checked(_loaded(installed[name]), name)
    known = [*TASKS, *installed]
    raise ConfigurationError(
        f"The task is {name!r}; it must be auto, one of {', '.join(known)}, or a class in a file, "
        f"path/to/file.py:Class.{nearest(name, known)}"
    )


def _loaded(point: EntryPoint) -> object:
    try:
        return point.load()
    except Exception as error:  # the code of another package may raise anything
        raise ConfigurationError(
            f"The task '{point.name}' is {point.value} of an installed package, which cannot be imported "
            f"({type(error).__name__}: {error}). Mend or remove the package."
        ) from error


def _in_file(path: str, class_name: str) -> object:
    file = Path(os.path.expanduser(path))
    if not file.is_file():
        raise ConfigurationError(f"data.task names the file '{path}', and there is none.")
    module = _module(file.resolve())
    own = [
        name
        for name, value in vars(module).items()
        if inspect.isclass(value)
        and issubclass(value, Task)
        and value.__module__ == module.__name__
    ]
    if class_name not in vars(module):
        asked = f"no '{class_name}' in it" if class_name else "no class is named after it"
        raise ConfigurationError(
            f"data.task names the file '{path}', and {asked}; write {path}:Class. Its tasks: "
            f"{', '.join(own) or 'none'}.{nearest(class_name, own)}"
        )
    return vars(module)[class_name]


def _module(file: Path) -> ModuleType:
    """The module in a file, imported once for each content, so that a class stays one and the same."""
    content = file.read_bytes()
    name = f"lorakit_task_{hashlib.sha256(bytes(file) + content).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a user's code may raise anything
        del sys.modules[name]
        raise ConfigurationError(
            f"data.task: the file '{file}' cannot be imported ({type(error).__name__}: {error}). Mend it."
        ) from error
    return module


def _checked(found: object, name: str) -> type[Task]:
    """Hold what a name led to against what a task must be."""
    if not inspect.isclass(found) or not issubclass(found, Task):
        raise ConfigurationError(
            f"data.task is {name!r}, which is {found!r:.80}; it must be a class that inherits from a task, for "
            "example lorakit.tasks.Completion or Classification."
        )
    if "name" not in vars(found) or found.name in TASKS:
        raise ConfigurationError(
            f"data.task is {name!r}, and the class has "
            + (
                f"the name {found.name!r} of a task of lorakit"
                if hasattr(found, "name")
                else "no name"
            )
            + '; give it one of its own: name = "...".'
        )
    if missing := sorted(found.__abstractmethods__):
        raise ConfigurationError(
            f"data.task is {name!r}, and the class lacks {', '.join(missing)}; write it, or inherit from "
            "Completion, Chat, Classification or Regression, which have it."
        )
    return found
