"""Find tasks by name: those of lorakit, of installed packages and of files."""

from __future__ import annotations

import inspect

from lorakit.errors import ConfigurationError, nearest
from lorakit.extensions import installed, load_from_file, load_installed, names_a_file
from lorakit.tasks.chat import Chat
from lorakit.tasks.classification import Classification, Regression
from lorakit.tasks.data_to_text import DATA_TO_TEXT
from lorakit.tasks.glue import GLUE
from lorakit.tasks.language_modelling import Completion, PlainText
from lorakit.tasks.summarization import SAMSum
from lorakit.tasks.task import Task
from lorakit.tasks.text_to_sql import WikiSQL

GENERIC: dict[str, type[Task]] = {
    task.name: task for task in (Completion, Chat, PlainText, Classification, Regression)
}
"""Generic tasks, which read any data with their columns."""

NAMED: tuple[type[Task], ...] = (*GLUE, *DATA_TO_TEXT, WikiSQL, SAMSum)
"""Named tasks, which have their own data: those of the paper."""

TASKS: dict[str, type[Task]] = {**GENERIC, **{task.name: task for task in NAMED}}
"""All tasks of lorakit."""

ENTRY_POINTS = "lorakit.tasks"
"""Group of entry points under which installed packages register tasks."""


def generic_task(task: type[Task]) -> type[Task]:
    """Return the generic task that `task` is or inherits from."""
    return next((g for g in GENERIC.values() if issubclass(task, g)), GENERIC["completion"])


def task_type(name: str) -> type[Task]:
    """Return the class of the task `name`.

    Args:
        name: A task of lorakit, a task that an installed package registers under the entry points `lorakit.tasks`, or
            a class in a file: `folder/file.py:Class`.

    Raises:
        ConfigurationError: The task does not exist, or the class is not a complete task.
    """
    if name in TASKS:
        return TASKS[name]
    if names_a_file(name):
        value = load_from_file(name, "data.task", lambda kind: issubclass(kind, Task))
        return _validated(value, name)
    points = installed(ENTRY_POINTS)
    if name in points:
        return _validated(load_installed(points[name], "task"), name)
    names = [*TASKS, *points]
    raise ConfigurationError(
        f"The task is {name!r}; it must be auto, one of {', '.join(names)}, or a class in a file, "
        f"path/to/file.py:Class.{nearest(name, names)}"
    )


def _validated(value: object, name: str) -> type[Task]:
    """Return `value` after checking that it is a complete task with a unique name."""
    if not inspect.isclass(value) or not issubclass(value, Task):
        raise ConfigurationError(
            f"data.task is {name!r}, which is {value!r:.80}; it must be a class that inherits from a task, for "
            "example lorakit.tasks.Completion or Classification."
        )
    if "name" not in vars(value) or value.name in TASKS:
        problem = (
            f"the name {value.name!r} of a task of lorakit" if hasattr(value, "name") else "no name"
        )
        raise ConfigurationError(
            f'data.task is {name!r}, but the class has {problem}; set a unique one: name = "...".'
        )
    if missing := sorted(value.__abstractmethods__):
        raise ConfigurationError(
            f"data.task is {name!r}, but the class lacks {', '.join(missing)}; implement it, or inherit from "
            "Completion, Chat, Classification or Regression."
        )
    return value
