"""What an adapter's files say about it, read without its tensors."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

from lorakit import storage
from lorakit.file_names import CONFIG, LORAKIT_JSON, PEFT_CONFIG, TOKENIZER_CONFIG
from lorakit.serving.folders import Location, State
from lorakit.tasks import TASKS
from lorakit.training.checkpoint import step_of
from lorakit.training.run_folder import read_settings

CHAT_TEMPLATE_FILE = "chat_template.jinja"


@dataclass(frozen=True)
class Card:
    """Facts for a list of adapters. None is not known."""

    path: str | None = None
    size: int | None = None
    """Bytes of its file of tensors."""
    base: str | None = None
    revision: str | None = None
    """Revision of the base, "" for the default one; None if the file records a hash of the base's weights."""
    method: str | None = None
    rank: int | None = None
    alpha: float | None = None
    task: str | None = None
    labels: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    """The file and the number of examples of each split."""
    scores: dict[str, float] = field(default_factory=dict)
    step: int | None = None
    chat: bool | None = None
    """Whether its own tokenizer has a chat template; None if the adapter uses the base's tokenizer."""


def read_card(location: Location, state: State) -> Card:
    """Read the facts about an adapter.

    Raises:
        AdapterFileError: The file that describes it cannot be read.
    """
    folder = Path(location.folder)
    chat = _has_template(location, state)
    tensors = [file for file in state if file.path.endswith((".safetensors", ".bin"))]
    # A checkpoint replaces the tensors of the folder that describes them.
    start = os.path.join(location.path, "")
    size = sum(file.size for file in tensors if file.path.startswith(start))
    if not os.path.lexists(folder / LORAKIT_JSON):
        options = storage.read_json(folder / PEFT_CONFIG)
        return Card(
            path=location.path,
            size=size,
            base=_typed(options.get("base_model_name_or_path"), str),
            revision=_typed(options.get("revision"), str) or "",
            method=_typed(options.get("peft_type"), str),
            rank=_typed(options.get("r"), int),
            alpha=_typed(options.get("lora_alpha"), (int, float)),
            task=_typed(options.get("task_type"), str),
            chat=chat,
        )
    record = storage.read_json(folder / LORAKIT_JSON)
    method, provenance = _mapping(record, "method"), _mapping(record, "provenance")
    labels, scores = provenance.get("labels"), _mapping(provenance, "scores")
    step = provenance.get("step")
    if location.checkpoint is not None:
        step, scores = step_of(Path(location.checkpoint)), {}
    return Card(
        path=location.path,
        size=size,
        base=_typed(_mapping(record, "base").get("name"), str),
        method=_typed(method.get("name"), str),
        rank=_typed(method.get("rank"), int),
        alpha=_typed(method.get("alpha"), (int, float)),
        task=_typed(provenance.get("task"), str),
        labels=tuple(map(str, labels)) if isinstance(labels, list) else (),
        data=tuple(_data(_mapping(provenance, "data"))),
        scores={str(k): v for k, v in scores.items() if isinstance(v, int | float)},
        step=_typed(step, int),
        chat=chat,
    )


def card_of_run(folder: Path) -> Card | None:
    """Return what the settings of a run say about the adapter that it will save; None if there are none yet.

    The labels are known only for tasks that have classes of their own.

    Raises:
        RunFolderError: The settings cannot be read.
    """
    if not (folder / CONFIG).exists():
        return None
    settings = read_settings(folder)
    base, task = _mapping(settings, "base"), _mapping(settings, "data").get("task")
    return Card(
        base=_typed(base.get("name"), str),
        revision=_typed(base.get("revision"), str) or "",
        task=_typed(task, str),
        labels=getattr(TASKS.get(str(task)), "classes", ()),
    )


def _data(splits: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each split, without the folders of the machine that trained the adapter."""
    for name in splits:
        split = _mapping(splits, name)
        source, examples = _typed(split.get("source"), str), _typed(split.get("examples"), int)
        if source is not None and examples is not None:
            yield f"{name}: {PureWindowsPath(source).name}, {examples:,} examples"


def _has_template(location: Location, state: State) -> bool | None:
    """Return `Card.chat`, by the files from which transformers takes the template."""
    if not location.has_tokenizer:
        return None
    own_file = os.path.join(location.folder, CHAT_TEMPLATE_FILE)
    if any(file.path == own_file and file.size for file in state):
        return True
    return bool(storage.read_json(Path(location.folder, TOKENIZER_CONFIG)).get("chat_template"))


def _mapping(record: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = record.get(key)
    return value if isinstance(value, Mapping) else {}


def _typed(value: Any, kind: Any) -> Any:
    return value if isinstance(value, kind) else None
