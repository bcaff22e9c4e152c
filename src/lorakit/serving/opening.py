"""Open everything that answers requests: the base, the adapters, the engine."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.adapters import formats
from lorakit.compute.adapted import TEXT, recorded_base
from lorakit.compute.base import open_base
from lorakit.data import DataTask
from lorakit.errors import AdapterFileError, ConfigurationError, RunFolderError, nearest_path
from lorakit.file_names import ADAPTER
from lorakit.formatting import counted, visible
from lorakit.models.base_config import BaseConfig
from lorakit.models.loading import NEW_WEIGHTS, Base
from lorakit.serving import folders
from lorakit.serving.cards import Card, card_of_run, read_card
from lorakit.serving.choosing import engine_for
from lorakit.serving.classifying import ClassifyingEngine
from lorakit.serving.engine import Limits, Receipt
from lorakit.serving.serve_config import DEMO, ServeConfig, bytes_of
from lorakit.serving.store import AdapterStore
from lorakit.serving.threaded_engine import ThreadedEngine
from lorakit.serving.verification import Verdict, Verifier
from lorakit.tasks import TASKS

_LOG = logging.getLogger(__name__)


_KINDS = {name: task.kind for name, task in TASKS.items()} | {"SEQ_CLS": "classification"}
"""The kind of output by the recorded task; SEQ_CLS is PEFT's name."""


@dataclass
class Opened:
    """What answers requests."""

    base: Base
    name: str
    """Name of the base in requests."""
    store: AdapterStore
    engine: ThreadedEngine
    """Start it last, and close it at the end."""
    verifier: Verifier | None
    """None without --verify."""
    memory_notice: str | None = None
    """How many adapters and tokens fit into the memory for them; None if all adapters and a whole context fit."""


def open_all(config: ServeConfig, report: Callable[[Receipt, Verdict | None], Any]) -> Opened:
    """Open the base, the adapters and the engine.

    Args:
        config: The options of `lorakit serve`.
        report: Called with the verdict on each answer that --verify has chosen (`Verifier`).

    Raises:
        LorakitError: The base or a pinned adapter cannot be opened, or nothing is to be served.
    """
    root, followed = sources(config)
    cards = _cards(root, followed)
    task = _task(cards)
    if config.verify and not task.generates:
        raise ConfigurationError(
            "verify computes answers of text again, and all adapters are for classes or scores. Remove --verify and "
            "--verify_stops."
        )
    if config.num_labels and task.kind != "classification":
        raise ConfigurationError(
            f"num_labels is {config.num_labels}, and the adapters are not all for classes. Remove --num_labels."
        )
    base = open_base(_base(config.base, cards), task, num_labels=config.num_labels)
    # Adapters bring their heads; the store refuses those that do not.
    for notice in (text for text in base.notices if not text.startswith(NEW_WEIGHTS)):
        _LOG.warning("%s", visible(f"{base.source.name}: {notice}"))
    engine = _engine(base, config, task)
    store = AdapterStore(
        base,
        root,
        budget=bytes_of("adapter_memory", config.adapter_memory),
        followed=followed,
        pinned=config.pin,
        between_steps=lambda action: engine.between_steps(action).result(),
        allow_other_base=config.allow_other_base,
    )
    name = config.served_name or re.sub(r"\.gguf$", "", base.source.name, flags=re.IGNORECASE)
    if name in store.names():
        raise ConfigurationError(
            f"An adapter has the name of the base, '{name}'. Rename its folder, or name the base: --served_name NAME."
        )
    verifier = Verifier(engine, config.verify, report=report) if config.verify else None
    notice = _memory_notice(config, cards, engine.limits)
    return Opened(base, name, store, engine, verifier, notice)


def _memory_notice(config: ServeConfig, cards: list[Card], limits: Limits) -> str | None:
    """Return `Opened.memory_notice`; adapters that vary in size are counted by their mean."""
    parts = []
    budget = bytes_of("adapter_memory", config.adapter_memory)
    needed = sum(card.size or 0 for card in cards)
    if needed > budget:
        fitting = budget * len(cards) // needed
        holds = f"holds about {fitting}" if fitting else "is too small for one"
        parts.append(
            f"--adapter_memory {config.adapter_memory} {holds} of {counted(len(cards), 'adapter')} at a time"
        )
    if limits.cache_tokens == limits.context:  # the context is the model's own if that is smaller
        parts.append(
            f"--cache_memory {config.cache_memory} holds {limits.cache_tokens:,} tokens of running requests"
        )
    return "; ".join(parts) or None


def _engine(base: Base, config: ServeConfig, task: DataTask) -> ThreadedEngine:
    limits: dict[str, Any] = {
        "running": config.max_running,
        "queue": config.max_queue,
        "prompt_tokens": config.max_prompt_tokens,
    }
    if not task.generates:
        return ClassifyingEngine(base, **limits)
    cache_bytes = bytes_of("cache_memory", config.cache_memory)
    return engine_for(base.model, base.text_tokenizer, cache_bytes=cache_bytes, **limits)


def sources(config: ServeConfig) -> tuple[Path | None, dict[str, str]]:
    """Return the folder of adapters, and the runs to follow by name.

    Raises:
        ConfigurationError: The folder does not exist, a name cannot be used, or there is nothing to serve.
    """
    followed = config.followed
    for name, path in followed.items():
        if not folders.is_public_name(name):
            raise ConfigurationError(
                f"follow has the name {name!r:.80} for the run '{path}'. Write NAME={path}, with a name of up to "
                f"{folders.LONGEST_NAME} printable characters."
            )
    if config.adapters is not None:
        # Absolute, because clients see messages without the folders of absolute paths.
        root = Path(os.path.abspath(config.adapters))
        if not root.is_dir():
            raise ConfigurationError(
                f"adapters is '{root}', which is not a folder. Check the path."
            )
        if formats.is_adapter(root):
            raise ConfigurationError(
                f"adapters is '{root}', which is an adapter itself. Name the folder that holds it: --adapters "
                f"{root.parent}."
            )
        for name in followed.keys() & set(folders.adapters_in(root)):
            raise ConfigurationError(
                f"The run '{followed[name]}' and an adapter in '{root}' have the name '{name}'. Follow the run under "
                f"another name, --follow NAME={followed[name]}, or leave out --follow."
            )
        return root, followed
    if followed or (config.base is not None and config.base.name):
        return None, followed
    if not formats.is_adapter(Path(DEMO, ADAPTER)):
        raise ConfigurationError(
            "There is no adapter to serve. Name a folder of adapters, --adapters DIR, or make one: lorakit demo writes "
            f"{DEMO}, which this command then serves as 'demo'."
        )
    return None, {"demo": DEMO}


def _cards(root: Path | None, followed: dict[str, str]) -> list[Card]:
    """Return the cards of the adapters; if there is no adapter yet, the cards of the runs' settings.

    A damaged adapter is logged and skipped here. Only a request or --pin that names it fails.
    """
    for path in followed.values():
        if not Path(path).exists():
            _LOG.warning(
                "There is no run at '%s' yet; its adapter is served once it is there.%s",
                visible(path),
                nearest_path(path),
            )
    names = folders.adapters_in(root) if root else ()
    places = [folders.AdapterSource(f"{root}/{name}") for name in names]
    cards: list[Card] = []
    runs: list[Card] = []
    for source in [*places, *map(folders.RunSource, followed.values())]:
        try:
            location = source.locate()
            if location is not None:
                cards.append(read_card(location, location.state()))
            elif card := card_of_run(Path(source.path)):
                runs.append(card)
        except (AdapterFileError, RunFolderError) as error:
            _LOG.warning("%s", error)
    return cards or runs  # an adapter records the base by its full name, and a task with its labels


def _base(configured: BaseConfig | None, cards: list[Card]) -> BaseConfig:
    """Return the configured base, or without a name the base that all adapters record."""
    base = configured or BaseConfig()
    if base.name:
        return base
    names = sorted({card.base for card in cards if card.base})
    revisions = sorted({c.revision for c in cards if c.base and c.revision is not None})
    if len(names) != 1:
        found = (
            f"The adapters were made for {', '.join(names)}"
            if names
            else "The adapters record no base"
            if cards
            else "There is no adapter and no run yet that records a base"
        )
        raise ConfigurationError(f"{found}. Name the base to serve: --base.name MODEL.")
    if len(revisions) > 1:
        listed = ", ".join(revision or "the default one" for revision in revisions)
        raise ConfigurationError(
            f"The adapters were made for several revisions of {names[0]}: {listed}. Name the one to serve: --base.name "
            f"{names[0]} --base.revision REVISION."
        )
    return recorded_base(base, names[0], revisions[0] or None if revisions else None)


def _task(cards: list[Card]) -> DataTask:
    """Return the task that decides the model's head: text, unless every adapter has classes or a score."""
    kinds = [_KINDS.get(card.task or "", "text") for card in cards]
    if not kinds or any(kind not in ("classification", "regression") for kind in kinds):
        return TEXT
    labels = max((card.labels for card in cards), key=len)
    name = "classification" if "classification" in kinds else "regression"
    return DataTask(name=name, labels=labels)
