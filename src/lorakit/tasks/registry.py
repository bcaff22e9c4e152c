"""Every task by its name: the ones that come with lorakit, those of other packages, and those in files."""

from __future__ import annotations

import inspect
from pathlib import Path

from lorakit.errors import ConfigurationError, nearest
from lorakit.extensions import installed, load_from_file, load_installed, names_a_file
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


def file_of(name: str) -> Path | None:
    """Return the file that `name` takes a task from; None for a task of lorakit or of a package."""
    path, _, _ = name.rpartition(":")
    return Path(path).expanduser() if name not in TASKS and path.endswith(".py") else None


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
    if names_a_file(name):
        found = load_from_file(name, "data.task", lambda kind: issubclass(kind, Task))
        return _checked(found, name)
    points = installed(ENTRY_POINTS)
    if name in points:
        return _checked(load_installed(points[name], "task"), name)
    known = [*TASKS, *points]
    raise ConfigurationError(
        f"The task is {name!r}; it must be auto, one of {', '.join(known)}, or a class in a file, "
        f"path/to/file.py:Class.{nearest(name, known)}"
    )


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
