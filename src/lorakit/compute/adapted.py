"""A base model with an adapter on it, from the adapter's own record."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer

from lorakit.adapters import formats
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.adapters.loading import load_stored
from lorakit.compute.base import open_base
from lorakit.data import DataTask
from lorakit.errors import AdapterFileError, ConfigurationError, require_choice
from lorakit.models.base_config import BaseConfig
from lorakit.models.loading import Base
from lorakit.tasks import GENERIC, TASKS, NamedText, task_type

TEXT = DataTask(name="completion", labels=())
"""What a model is for when nothing says otherwise: to write text."""

ADAPTER = "adapter"
"""Name of the adapter on its model."""


def recorded_task(adapter: str, asked: str | None = None) -> DataTask | None:
    """Return what an adapter says it was trained for; None where its file does not say (PEFT's own).

    Args:
        adapter: Its folder.
        asked: The task that the configuration names. A task of the user's own is code, which is run where the user
            names it and never because a file does: without it, such an adapter counts as one of the generic task.
    """
    return _recorded_task(formats.read(adapter), adapter, asked)


def _recorded_task(
    stored: StoredAdapter, adapter: str, asked: str | None = None
) -> DataTask | None:
    made = stored.provenance
    if "task" not in made:
        return None
    name, labels = made["task"], made.get("labels")
    if name not in TASKS and made.get("generic_task") in GENERIC:
        name = asked if asked and task_type(asked).name == name else made["generic_task"]
    known = isinstance(name, str) and (name in TASKS or name == asked)
    if not known or not isinstance(labels, list) or not all(isinstance(x, str) for x in labels):
        raise AdapterFileError(
            f"The adapter {adapter} records the task {name!r} with the labels {labels!r}; a task is one of "
            f"{', '.join(TASKS)}, with a list of names as labels."
        )
    return DataTask(name=name, labels=tuple(labels))


@dataclass(frozen=True, kw_only=True)
class Prompting:
    """How an adapter's prompts were written in training."""

    task: type[NamedText] | None = None
    """The named task that wrote them; None where they are plain text."""
    encoding: str | None = None
    note: str = ""
    """What the user should know of it."""


def prompting(adapter: str | None, task: str | None, encoding: str | None) -> Prompting:
    """Return how prompts are written: as `task` and `encoding` say, else as the adapter records.

    Raises:
        LorakitError: The adapter cannot be read, there is no such task or encoding, or prompts were made by a template
            of the run's own.
    """
    made = formats.read(adapter).provenance if adapter else {}
    recorded, about = made.get("task"), f"the adapter {adapter}"
    if task is None and recorded not in TASKS and made.get("encoding"):
        return Prompting(
            note=f"{about} was trained for the task '{recorded}' of a file of its own, and prompts are taken as they "
            f"are; name it, --task path/to/file.py:Class, to have them written as in training."
        )
    chosen = task_type(task) if task else TASKS.get(str(recorded))
    if chosen is None or not issubclass(chosen, NamedText):
        if encoding is not None:
            raise ConfigurationError(
                f"encoding is {encoding!r}, and there is no named task of texts; name one with --task, for example "
                "e2e_nlg."
            )
        return Prompting()
    if encoding is None and recorded == chosen.name:
        encoding = made.get("encoding")
        settings = made.get("config", {}).get("data", {})
        if encoding == "prompt" and settings.get("prompt_template"):
            raise ConfigurationError(
                f"{about} was trained with a prompt_template of its own, {settings['prompt_template']!r}. Write whole "
                "prompts like it, and take them as they are: --task completion."
            )
    encoding = encoding or chosen.encodings[0]
    require_choice("encoding", encoding, chosen.encodings)
    return Prompting(
        task=chosen,
        encoding=encoding,
        note=f"prompts are contexts of task {chosen.name}, put into its encoding '{encoding}'; --task completion takes "
        "them as they are.",
    )


def open_adapted(
    base: BaseConfig | None,
    adapter: str | None,
    *,
    task: DataTask | None = None,
    allow_other_base: bool = False,
) -> Base:
    """Load a base and let an adapter act on it.

    Args:
        base: The base model; None takes the one that the adapter records.
        adapter: Adapter folder; None leaves the base as it is.
        task: What the model's head is for; None takes what the adapter records, else text generation.
        allow_other_base: Accept a base other than the one the adapter records.

    Returns:
        The base, its tokenizer that of the adapter's folder where it has one (it may have been given new
        tokens or another chat template).

    Raises:
        LorakitError: The base or the adapter cannot be read, or do not fit each other.
    """
    if adapter is None:
        if base is None:
            raise ConfigurationError("Name a model: --base.name smollm2-135m, or --adapter FOLDER.")
        return open_base(base, task or TEXT)
    stored = formats.read(adapter)
    if base is None:
        name = stored.base.source.name if stored.base else None
        if name is None:
            raise ConfigurationError(
                f"The adapter {adapter} does not say which base it was made for. Name it: --base.name MODEL."
            )
        base = BaseConfig(name=name)
    opened = open_base(base, task or _recorded_task(stored, adapter) or TEXT)
    load_stored(opened.model, stored, adapter, name=ADAPTER, allow_other_base=allow_other_base)
    if (Path(adapter) / "tokenizer_config.json").exists():
        opened.tokenizer = AutoTokenizer.from_pretrained(adapter, local_files_only=True)
    return opened
