"""Tasks: what an example of each kind of data looks like.

To add one, write a subclass of `Task` in a file of its own and name it in `TASKS`.
"""

from __future__ import annotations

from lorakit.tasks.chat import Chat
from lorakit.tasks.classification import Classification, Regression
from lorakit.tasks.language_modelling import Completion
from lorakit.tasks.task import (
    BadRow,
    Example,
    Fields,
    LabelledExample,
    LanguageExample,
    RowError,
    Task,
    TooLong,
    UnknownLabel,
)

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Completion, Chat, Classification, Regression)
}
"""Every task by its name in the configuration."""

__all__ = [
    "TASKS",
    "BadRow",
    "Chat",
    "Classification",
    "Completion",
    "Example",
    "Fields",
    "LabelledExample",
    "LanguageExample",
    "Regression",
    "RowError",
    "Task",
    "TooLong",
    "UnknownLabel",
]
