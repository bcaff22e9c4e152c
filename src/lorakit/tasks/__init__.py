"""Tasks: what an example of each kind of data looks like, and how it is scored.

To add one, write a subclass in a file of its own and name it in `lorakit.tasks.registry`; or, outside the package,
name it as `data.task: path/to/file.py:Class` or under the entry points `lorakit.tasks`.
"""

from __future__ import annotations

from lorakit.tasks.chat import Chat
from lorakit.tasks.classification import Classification, Regression
from lorakit.tasks.data_set import DataSet
from lorakit.tasks.language_modelling import Completion
from lorakit.tasks.named_text import NamedText
from lorakit.tasks.registry import GENERIC, TASKS, file_of, generic_task, task_type
from lorakit.tasks.task import (
    BadRow,
    Example,
    Fields,
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
    "Kind",
    "LabelledExample",
    "LanguageExample",
    "NamedText",
    "Regression",
    "RowError",
    "Task",
    "TooLong",
    "UnknownLabel",
    "file_of",
    "generic_task",
    "task_type",
    "text_field",
]
