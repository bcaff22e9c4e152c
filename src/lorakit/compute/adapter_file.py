"""An adapter's file, and what it records about its training: the task, the data and the form of the prompts."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lorakit.adapters import formats
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.data import DataConfig, DataTask
from lorakit.data.templates import Template
from lorakit.errors import AdapterFileError, ConfigurationError, require_choice
from lorakit.models.model_classes import head_of_class
from lorakit.models.tokenizer import tokenizer_in
from lorakit.tasks import GENERIC, TASKS, Chat, NamedText, task_type
from lorakit.tasks.classification import PAIR

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdapterFile:
    """An adapter that has been read or computed, with its path and its tokenizer."""

    path: str
    """Its folder or file; for a computed adapter, the folder that it is saved in."""
    stored: StoredAdapter
    tokenizer_folder: str | None = None
    """The folder to read its tokenizer from; None is `path`. The folder may have no tokenizer."""

    @classmethod
    def read(cls, path: str | Path | None) -> AdapterFile | None:
        """Read the adapter at `path`; None without a path.

        Raises:
            AdapterFileError: There is no adapter, or it is damaged or unsafe.
        """
        return None if path is None else cls(str(path), formats.read(path))

    @property
    def provenance(self) -> dict[str, Any]:
        """What the file records about its training. A PEFT folder has only `peft`, some of its options."""
        return self.stored.provenance

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer of the adapter's folder, or None: training may have added tokens or a chat template.

        Raises:
            AdapterFileError: It cannot be read, or needs Python code of its own.
        """
        folder = self.path if self.tokenizer_folder is None else self.tokenizer_folder
        if not formats.has_tokenizer(folder):
            return None
        return tokenizer_in(folder)


def recorded_task(adapter: AdapterFile, configured: str | None = None) -> DataTask | None:
    """Return the task that an adapter records; None for a file that records none, such as PEFT's.

    A custom task is code, which never runs because a file names it. Unless the configuration names the same task, it
    is replaced by the generic task that it inherits from, which the file records too.

    Raises:
        AdapterFileError: The recorded task or labels are invalid.
    """
    record = adapter.provenance
    if "task" not in record:
        return None
    name, labels = record["task"], record.get("labels")
    if name not in TASKS and record.get("generic_task") in GENERIC:
        name = str(configured) if _is_named(name, configured) else record["generic_task"]
    is_valid = isinstance(name, str) and (name in TASKS or name == configured)
    if not is_valid or not isinstance(labels, list) or not all(isinstance(x, str) for x in labels):
        raise AdapterFileError(
            f"The adapter {adapter.path} records the task {name!r} with the labels {labels!r}; a task is one of "
            f"{', '.join(TASKS)}, with a list of names as labels."
        )
    return DataTask(name=name, labels=tuple(labels))


def opening_task(adapter: AdapterFile) -> tuple[DataTask | None, int | None]:
    """Return the task that determines the head of an adapter's base, and the number of the head's outputs.

    PEFT and `adapters.save` record no task, but whether the base is a classifier. The adapter then holds the head,
    unless the base's own was not trained. The task is the recorded one, else classification or regression for a
    classifier, else None. The number is None if the task or the base determines it.

    Raises:
        AdapterFileError: The recorded task or labels are invalid.
    """
    task, stored = recorded_task(adapter), adapter.stored
    recorded = stored.provenance.get("peft")
    is_classifier = isinstance(recorded, Mapping) and recorded.get("task_type") == "SEQ_CLS"
    if stored.base is not None:
        name = stored.base.class_name
        is_classifier = head_of_class(name, is_encoder_decoder=False) == "sequence-classification"
    if task is not None or not is_classifier:
        return task, None
    # The head is outside the backbone, which the numbered blocks are in. Its last matrix has a row for each class; a
    # matrix before it has as many rows as the next has columns.
    names = [*stored.layers, *stored.modules, *stored.trained]
    backbone = {name.partition(".")[0] for name in names if re.search(r"\.\d+\.", name)}
    head = [t for name, t in stored.trained.items() if name.partition(".")[0] not in backbone]
    shapes = [tensor.shape for tensor in head if tensor.ndim == 2]
    outputs = min({rows for rows, _ in shapes} - {columns for _, columns in shapes}, default=None)
    if outputs == 1:
        return DataTask(name="regression"), None
    return DataTask(name="classification"), outputs


def _is_named(recorded: Any, configured: str | None) -> bool:
    """Return whether the configuration names the task that an adapter records, by its name or by its file."""
    return configured is not None and task_type(configured).name == recorded


def recorded_data(adapter: AdapterFile | None, configured: str | None = None) -> DataConfig:
    """Return the task, the encoding, the columns and the templates that an adapter records.

    All are unset for a file that records no task, such as PEFT's, and for a custom task other than the configured one.

    Raises:
        AdapterFileError: A recorded setting is invalid.
    """
    if adapter is None:
        return DataConfig()
    record = adapter.provenance
    task: Any = record.get("task")
    if _is_named(task, configured):
        task = configured
    elif task not in TASKS:
        return DataConfig()
    try:
        return DataConfig(
            task=task, encoding=record.get("encoding"), **templates_of(adapter.stored)
        )
    except ConfigurationError as error:
        raise AdapterFileError(
            f"The adapter {adapter.path} records invalid settings of its data: {error} Save or download it again."
        ) from None


def templates_of(stored: StoredAdapter) -> dict[str, Any]:
    """Return the settings of the data that later uses of an adapter take from its file, beside task and encoding."""
    names = ("columns", "prompt_template", "completion_template")
    settings = {name: stored.setting("data", name) for name in names}
    return {name: value for name, value in settings.items() if value is not None}


def as_recorded(
    data: DataConfig, adapter: AdapterFile | None, columns: Collection[str]
) -> DataConfig:
    """Return `data` with what the adapter records for the same task in place of unset settings.

    Rows may be of another file than those of training: columns that they lack are not mapped, and a template that
    names such a column is not applied, with a warning. The task of `data` is not "auto".

    Raises:
        AdapterFileError: A recorded setting is invalid.
    """
    recorded = recorded_data(adapter, data.task)
    if adapter is None or data.task != recorded.task:
        return data
    # A task reads a text or a pair of texts: one that the user names takes the place of the recorded ones.
    inputs = {"text", *PAIR}
    replaced = inputs if inputs & data.columns.keys() else set()
    usable = {f: c for f, c in recorded.columns.items() if c in columns and f not in replaced}
    renamed = {**usable, **data.columns}
    if data.encoding not in (None, recorded.encoding):
        return dataclasses.replace(data, columns=renamed)
    templates = {}
    known = {*columns, *renamed, *task_type(data.task).derived}
    for name in ("prompt_template", "completion_template"):
        text = getattr(recorded, name)
        if text is None or getattr(data, name) is not None:
            continue
        if known.issuperset(Template(text).fields):
            templates[name] = text
        else:
            _LOG.warning(
                "the adapter %s was trained with the %s %r, which needs other columns than these data have; the "
                "data are used without it.",
                *(adapter.path, name, text),
            )
    return dataclasses.replace(data, columns=renamed, encoding=recorded.encoding, **templates)


def text_task(adapter: AdapterFile | None) -> DataTask | None:
    """Return the task that an adapter records, for commands that generate text; None if it records none.

    Raises:
        ConfigurationError: The adapter predicts labels or scores.
    """
    if adapter is None:
        return None
    task, _ = opening_task(adapter)
    if task is not None and not task.generates:
        apply = (
            f"lorakit predict --adapter {adapter.path} --data.test FILE --output predictions.jsonl"
        )
        if recorded_task(adapter) is None:  # its classes have no names
            apply = f"lorakit merge {adapter.path} OUTPUT, and load OUTPUT in transformers"
        raise ConfigurationError(
            f"The adapter {adapter.path} was trained for {task.name} and generates no text. To apply it: {apply}."
        )
    return task


@dataclass(frozen=True, kw_only=True)
class PromptFormat:
    """How prompts are formatted before generation: as in the adapter's training, unless the user chooses a task."""

    task: type[NamedText] | type[Chat] | None = None
    """The named task, or the chat template, that formats them; None leaves them unchanged."""
    encoding: str | None = None
    """The task's encoding, paper or prompt; None without a task."""
    note: str = ""
    """A sentence for the user."""


def prompt_format(
    adapter: AdapterFile | None, task: str | None, encoding: str | None
) -> PromptFormat:
    """Return the prompt format that `task` and `encoding` set, else the one that the adapter records.

    Raises:
        LorakitError: There is no such task or encoding, or training used a custom prompt template.
    """
    record = adapter.provenance if adapter else {}
    recorded, path = record.get("task"), adapter.path if adapter else ""
    if task is encoding is None and adapter is not None and recorded is None:
        return PromptFormat(
            note=f"the adapter {path} does not record its task, and plain prompts are used unchanged. --chat "
            "formats them with the chat template."
        )
    # An encoding but no task of lorakit: a custom task, whose code never runs because a file names it.
    if task is None and recorded not in TASKS and record.get("encoding"):
        return PromptFormat(
            note=f"the adapter {path} was trained for the custom task '{recorded}', and prompts are used unchanged. "
            "Name its file, --data.task path/to/file.py:Class, to format them as in training."
        )
    chosen = task_type(task) if task else TASKS.get(str(recorded))
    if task is None and recorded not in TASKS and record.get("generic_task") == Chat.name:
        chosen = Chat
    if chosen is not None and issubclass(chosen, Chat) and encoding is None:
        note = (
            f"the adapter {path} was trained for {recorded}: prompts are user messages in the chat template. "
            "--raw uses them unchanged."
        )
        return PromptFormat(task=Chat, note="" if task else note)
    if chosen is None or not issubclass(chosen, NamedText):
        if encoding is not None:
            raise ConfigurationError(
                f"data.encoding is {encoding!r}, and there is no named task of texts. Set data.task, for example "
                "e2e_nlg."
            )
        return PromptFormat()
    if recorded == chosen.name and encoding in (None, record.get("encoding")):
        encoding = record.get("encoding")
        template = recorded_data(adapter, task).prompt_template
        if encoding == "prompt" and template:
            raise ConfigurationError(
                f"The adapter {path} was trained with the prompt_template {template!r}. Write whole prompts in this "
                "form, and use them unchanged: --raw."
            )
    encoding = encoding or chosen.encodings[0]
    require_choice("data.encoding", encoding, chosen.encodings)
    return PromptFormat(
        task=chosen,
        encoding=encoding,
        note=f"prompts are contexts of task {chosen.name}, formatted with its encoding '{encoding}'; --raw uses "
        "them unchanged.",
    )
