"""Recipes: the hyper-parameters behind the paper's tables, by name, as settings of a run.

A name is ``model/task/method``, with ``@paper``, ``@code`` or ``@prior`` behind it for where the numbers
come from: the paper's own tables, the official repository, or the earlier work that it took a row from.
Where paper and code differ, both are there; a name without its origin is the paper's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lorakit.errors import ConfigurationError, nearest

Origin = Literal["paper", "code", "prior"]
ORIGINS: tuple[Origin, ...] = ("paper", "code", "prior")
"""Where a recipe comes from, in the order in which a name without one looks."""

MODELS: dict[str, str | None] = {
    "roberta-base": "FacebookAI/roberta-base",
    "roberta-large": "FacebookAI/roberta-large",
    "deberta-v2-xxlarge": "microsoft/deberta-v2-xxlarge",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt3-175b": None,
}
"""The paper's models and their hub ids. GPT-3's weights are not public: name a decoder with base.name."""

METRICS = {
    **dict.fromkeys(("mnli", "sst2", "mrpc", "qnli", "qqp", "rte"), "accuracy"),
    "cola": "matthews",
    "stsb": "pearson",
}
"""The score by which a run on GLUE keeps its best epoch."""

METHOD_SETTINGS = (
    "method",
    *("lora", "full", "bitfit", "bottleneck", "prefix_embedding", "prefix_layer"),
)
"""The settings that say what is trained."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """The settings of one published run."""

    name: str
    """model/task/method@origin."""
    source: str
    """The table, script or section that the numbers stand in."""
    settings: dict[str, Any]
    """Settings of `TrainConfig` by dotted name, those that differ from its defaults or that the source states."""
    decoding: dict[str, Any] = field(default_factory=dict)
    """Settings of `Decoding` with which the source generates its outputs; for ``lorakit evaluate``."""
    notes: tuple[str, ...] = ()
    """What the source says that no setting expresses, and what is inferred."""

    @property
    def origin(self) -> str:
        """paper, code or prior."""
        return self.name.rpartition("@")[2]

    def starting_from_adapter(self) -> dict[str, Any]:
        """Return the settings for a run that takes its method from an adapter (``from_adapter``)."""
        return {k: v for k, v in self.settings.items() if k.split(".")[0] not in METHOD_SETTINGS}


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Recipes of one model and method that share their source, task by task."""

    model: str
    method: str
    origin: Origin
    source: str
    settings: Mapping[str, Any]
    """What every task has, by dotted name."""
    tasks: str
    """What differs, as a text table: tasks across, settings down; ``-`` leaves a setting out."""
    decoding: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def recipes(self) -> Iterator[Recipe]:
        """Yield the recipe of each task."""
        head, *lines = [
            [cell.strip() for cell in line.split("|")] for line in self.tasks.strip().splitlines()
        ]
        for column, task in enumerate(head[1:], 1):
            own = {line[0]: _value(line[column]) for line in lines if line[column] != "-"}
            yield self._recipe(task, own)

    def _recipe(self, task: str, own: dict[str, Any]) -> Recipe:
        data, _, size = task.partition("-")
        settings: dict[str, Any] = {"data.task": data, "data.too_long": "truncate"}
        if (hub_id := MODELS[self.model]) is not None:
            settings["base.name"] = hub_id
        if self.model != "gpt3-175b" and data in METRICS:
            settings["evaluation.metric"] = METRICS[data]
        settings |= {**self.settings, **own}
        notes = list(self.notes)
        if settings.pop("start", None) == "mnli":
            notes.append(
                "Starts from the adapter of the MNLI recipe: add --from_adapter with the best/ folder of its run."
            )
        if (dropout := settings.pop("head_dropout", None)) is not None:
            notes.append(
                f"Dropout before the classifier is {dropout:g}; a run keeps the base's own."
            )
        decoding = {**self.decoding}
        if (penalty := settings.pop("length_penalty", None)) is not None:
            decoding["length_penalty"] = penalty
        if (tokens := settings.pop("warmup_tokens", None)) is not None:
            per_step = settings["batch_size"] * settings["data.max_length"]
            settings["optimizer.warmup"] = max(1, math.ceil(tokens / per_step))
            notes.append(
                f"Warm-up is {tokens:,.0f} tokens: that many steps of full-length examples."
            )
        if size and (limit := _SIZES[size]) is not None:
            settings["data.limit"] = limit
            notes.append(
                "data.limit takes the first examples; the paper, and lorakit paper table16, draws them at random."
            )
        return Recipe(
            name=f"{self.model}/{task}/{self.method}@{self.origin}",
            source=self.source,
            settings=settings,
            decoding=decoding,
            notes=tuple(notes),
        )


_SIZES: dict[str, int | None] = {"100": 100, "1k": 1_000, "10k": 10_000, "392k": None}


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


@functools.cache
def recipes() -> dict[str, Recipe]:
    """Return every recipe by its whole name, its origin included."""
    from lorakit.paper.families import FAMILIES

    found = [recipe for family in FAMILIES for recipe in family.recipes()]
    by_name = {recipe.name: recipe for recipe in found}
    assert len(by_name) == len(found), "two recipes have one name"
    return by_name


def recipe(name: str) -> Recipe:
    """Return a recipe by its name; without ``@origin`` the paper's, else the code's, else prior work's.

    Raises:
        ConfigurationError: There is none; names the nearest.
    """
    known = recipes()
    names = [name] if "@" in name else [f"{name}@{origin}" for origin in ORIGINS]
    for full in names:
        if full in known:
            return known[full]
    short = dict.fromkeys(full.partition("@")[0] for full in known)
    raise ConfigurationError(
        f"There is no recipe '{name}'.{nearest(name, [*short, *known])} "
        "A name is model/task/method, for example roberta-base/mrpc/lora; 'lorakit recipes' lists them."
    )


def matching(words: str = "") -> list[Recipe]:
    """Return the recipes whose names hold every one of some words, in the order of the paper."""
    return [r for r in recipes().values() if all(word in r.name for word in words.lower().split())]
