"""A base model with an adapter on it, from the adapter's own record."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from lorakit.adapters import formats
from lorakit.adapters.loading import load_stored
from lorakit.adapters.stored import StoredAdapter
from lorakit.data import DataTask
from lorakit.errors import AdapterFileError, ConfigurationError
from lorakit.evaluation.base import open_base
from lorakit.evaluation.config import BaseConfig
from lorakit.models.loading import Base
from lorakit.tasks import GENERIC, TASKS, task_type

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
