"""Tasks: the format of the examples of each kind of data, and their scores.

To add a task to lorakit, write a subclass in a new file and list it in `lorakit.tasks.registry`. Outside the package,
set `data.task: path/to/file.py:Class`, or register the class under the entry points `lorakit.tasks`.
"""

from __future__ import annotations

from lorakit.tasks.chat import Chat
from lorakit.tasks.classification import Classification, Labelled, Regression
from lorakit.tasks.language_modelling import Completion, PlainText
from lorakit.tasks.named_text import NamedText
from lorakit.tasks.registry import GENERIC, TASKS, generic_task, task_type
from lorakit.tasks.task import (
    BadRow,
    DataSet,
    Example,
    Fields,
    Groups,
    Kind,
    LabelledExample,
    LanguageExample,
    RowError,
    Task,
    TooLong,
    UnknownLabel,
    text_field,
)

__all__ = [
    "GENERIC",
    "TASKS",
    "BadRow",
    "Chat",
    "Classification",
    "Completion",
    "DataSet",
    "Example",
    "Fields",
    "Groups",
    "Kind",
    "Labelled",
    "LabelledExample",
    "LanguageExample",
    "NamedText",
    "PlainText",
    "Regression",
    "RowError",
    "Task",
    "TooLong",
    "UnknownLabel",
    "generic_task",
    "task_type",
    "text_field",
]
