"""A recipe, as settings of a run; a family of recipes that share one source; and the settings of methods."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lorakit.tasks.registry import task_type

Origin = Literal["paper", "code", "prior", "derived"]
ORIGINS: tuple[Origin, ...] = ("paper", "code", "prior", "derived")
"""Origins of recipes, in the order in which a name without one is looked up."""

MODELS: dict[str, str | None] = {
    "roberta-base": "FacebookAI/roberta-base",
    "roberta-large": "FacebookAI/roberta-large",
    "deberta-v2-xxlarge": "microsoft/deberta-v2-xxlarge",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt3-175b": None,
    "mpnet-base": "mpnet-base",
}
"""The paper's models, with one in place of RoBERTa-base, and their names as a base. GPT-3's weights are not public:
pass a decoder as base.name."""

MNLI_OF_GPT3 = "validation_matched"
"""The development set of MNLI that the paper scores with GPT-3; Table 2 scores both."""
LABELS_FROM_HEAD = "MNLI labels come from a classification head here; GPT-3 generates them as text."

_LIMITS: dict[str, int | None] = {"100": 100, "1k": 1_000, "10k": 10_000, "392k": None}
"""Training examples by the size in a task's name, such as mnli-1k; None for all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """The settings of one published run."""

    name: str
    """model/task/method@origin."""
    source: str
    """The table, script or section that states the numbers."""
    settings: dict[str, Any]
    """Settings of `TrainConfig` by dotted name, those that differ from its defaults or that the source states."""
    decoding: dict[str, Any] = field(default_factory=dict)
    """The source's settings of `Decoding`; for ``lorakit evaluate``."""
    notes: tuple[str, ...] = ()
    """Facts of the source that no setting expresses, and values that are inferred."""

    @property
    def origin(self) -> str:
        """paper, code, prior or derived."""
        return self.name.rpartition("@")[2]


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Recipes of one model and method that share their source, one for each task."""

    model: str
    method: str
    origin: Origin
    source: str
    settings: Mapping[str, Any]
    """Settings that all tasks share, by dotted name."""
    tasks: str
    """Settings that differ, as a text table: tasks across, settings down; ``-`` omits a setting."""
    decoding: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def recipes(self) -> Iterator[Recipe]:
        """Yield the recipe of each task."""
        head, *lines = [
            [cell.strip() for cell in line.split("|")] for line in self.tasks.strip().splitlines()
        ]
        for column, task in enumerate(head[1:], 1):
            task_settings = {line[0]: _value(line[column]) for line in lines if line[column] != "-"}
            yield self._recipe(task, task_settings)

    def _recipe(self, task: str, task_settings: dict[str, Any]) -> Recipe:
        data, _, size = task.partition("-")
        settings: dict[str, Any] = {"data.task": data, "data.too_long": "truncate"}
        if (hub_id := MODELS[self.model]) is not None:
            settings["base.name"] = hub_id
        task_class = task_type(data)
        notes = list(self.notes)
        if task_class.kind != "text":
            settings["evaluation.metric"] = task_class.metric
            if self.model == "gpt3-175b":
                settings["data.validation_split"] = MNLI_OF_GPT3
                notes.append(LABELS_FROM_HEAD)
        settings |= {**self.settings, **task_settings}
        if settings.pop("start", None) == "mnli":
            notes.append(
                "The source starts from the adapter of its MNLI run: pass the best/ folder of such a run as "
                "--from_adapter, else the run starts from the base."
            )
        if (dropout := settings.pop("head_dropout", None)) is not None:
            notes.append(
                f"The source sets the dropout before the classifier to {dropout:g}; a run keeps the base's."
            )
        decoding = {**self.decoding}
        if (penalty := settings.pop("length_penalty", None)) is not None:
            decoding["length_penalty"] = penalty
        if (tokens := settings.pop("warmup_tokens", None)) is not None:
            per_step = settings["batch_size"] * settings["data.max_length"]
            settings["optimizer.warmup"] = max(1, math.ceil(tokens / per_step))
            notes.append(
                f"The source's warm-up of {tokens:,.0f} tokens is converted to steps of full-length examples."
            )
        if size and (limit := _LIMITS[size]) is not None:
            settings["data.limit"] = limit
            notes.append(
                "data.limit uses the first examples; the paper and lorakit paper table16 draw them at random."
            )
        return Recipe(
            name=f"{self.model}/{task}/{self.method}@{self.origin}",
            source=self.source,
            settings=settings,
            decoding=decoding,
            notes=tuple(notes),
        )


def lora(rank: int, *targets: str, alpha: float = 16.0) -> dict[str, Any]:
    """Return the settings of LoRA on these target roles."""
    return {"method": "lora", "lora.rank": rank, "lora.alpha": alpha, "lora.targets": targets}


def bottleneck(kind: str, size: int) -> dict[str, Any]:
    """Return the settings of bottleneck adapters."""
    return {"method": "bottleneck", "bottleneck.kind": kind, "bottleneck.size": size}


def prefix(method: str, length: int, infix: int) -> dict[str, Any]:
    """Return the settings of prefix_embedding or prefix_layer."""
    return {
        "method": method,
        f"{method}.prefix_length": length,
        f"{method}.infix_length": infix,
    }


def tables_by_method(text: str) -> dict[str, str]:
    """Split a table whose first column names methods into one table as in `Family.tasks` for each method.

    Rows without a method are for all of them.
    """
    (_, head), *lines = (line.split("|", 1) for line in text.strip().splitlines())
    rows: dict[str, list[str]] = {}
    for method, row in lines:
        rows.setdefault(method.strip(), []).append(row)
    shared = [head, *rows.pop("", [])]
    return {method: "\n".join([*shared, *own]) for method, own in rows.items()}


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
