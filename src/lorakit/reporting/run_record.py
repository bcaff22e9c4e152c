"""Reading of run folders, finished or not, without loading a model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit import storage
from lorakit.configuration import setting
from lorakit.errors import RunFolderError
from lorakit.evaluation.score import DIRECTIONS, Direction, directions_of, is_better
from lorakit.file_names import (
    ADAPTER,
    CONFIG,
    ENVIRONMENT,
    EVENTS,
    LORAKIT_JSON,
    METRICS,
    PREDICTION,
    RESULT,
    SAMPLES,
)
from lorakit.formatting import counted
from lorakit.methods.registry import SECTIONS
from lorakit.tasks import TASKS
from lorakit.training.run_folder import read_lines, read_settings


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The content of a run folder."""

    folder: Path
    config: Mapping[str, Any] = field(repr=False)
    """Every setting, as in config.yaml."""
    trained: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Record of the method in the adapter's lorakit.json; empty if there is no adapter."""
    result: Mapping[str, Any] | None = field(default=None, repr=False)
    """Content of result.json; None while the run is not finished."""
    sessions: Sequence[Mapping[str, Any]] = field(default=(), repr=False)
    """Machine, library versions and command of each start of the run."""
    train: Sequence[Mapping[str, Any]] = field(default=(), repr=False)
    """One record per step."""
    validation: Sequence[Mapping[str, Any]] = field(default=(), repr=False)
    """One record per evaluation."""
    samples: Sequence[Mapping[str, Any]] = field(default=(), repr=False)
    """Texts generated during evaluations."""
    events: Sequence[Mapping[str, Any]] = field(default=(), repr=False)
    """What went wrong and did not end the run."""
    provenance: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Provenance in the adapter's lorakit.json; empty if there is no adapter."""
    base: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Record of the base in the adapter's lorakit.json."""
    adapter_bytes: int | None = None
    """Size of the adapter's weights file; None if there is none."""
    predicted: Mapping[str, float] = field(default_factory=dict, repr=False)
    """Predictions of the planner, by the keys of `lorakit.reporting.run_report.PREDICTED`."""
    label: str | None = None
    """Name to show instead of the folder's name."""

    @property
    def name(self) -> str:
        """The label, or else the folder's name."""
        return self.label or self.folder.resolve().name

    @property
    def method(self) -> str:
        """The method as in a configuration, such as lora+bitfit; "" if only the adapter of the start names it."""
        return "+".join(self.methods)

    @property
    def methods(self) -> dict[str, Mapping[str, Any]]:
        """Settings of each trained method, by its name in a configuration; by its class name for a user's method.

        With `from_adapter` they are those of the trained adapter: the configuration's have no effect.
        """
        if self.config.get("from_adapter") is None:
            names = str(self.config.get("method", "")).split("+")
            return {name: _mapping(self.config.get(name)) for name in names}
        sections = {method_class.__name__: section for section, method_class in SECTIONS.items()}
        combined = self.trained.get("methods")
        records = map(_mapping, combined if isinstance(combined, list) else [self.trained])
        named = [(str(record["name"]), record) for record in records if "name" in record]
        return {sections.get(name, name): record for name, record in named}

    @property
    def base_name(self) -> str:
        """The `base.name` of the configuration."""
        return str(setting(self.config, "base.name") or "")

    @property
    def sizes(self) -> Mapping[str, int]:
        """Parameter counts and byte sizes that the run recorded; empty if it recorded none."""
        return self.sessions[-1].get("sizes", {}) if self.sessions else {}

    @property
    def directions(self) -> Mapping[str, Direction]:
        """Whether a lower or a higher score is better, by name; those of lorakit's tasks if the run recorded none."""
        recorded = self.sessions[-1].get("score_directions") if self.sessions else None
        if recorded is not None:
            return recorded
        return {name: d for task in TASKS.values() for name, d in directions_of(task).items()}

    @property
    def command(self) -> str | None:
        """The command that started the run."""
        return self.sessions[0].get("command") if self.sessions else None

    @property
    def is_deleted(self) -> bool:
        """Whether the run is finished and its adapter was deleted, as `lorakit paper --keep_weights false` does."""
        return self.result is not None and self.adapter_bytes is None

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second of the training steps so far; None before the first step."""
        seconds = self.total("seconds")
        return (self.total("tokens") or 0) / seconds if seconds else None

    @property
    def best_step(self) -> int | None:
        """The step of the best validation score; None if the run has none or is not finished."""
        return (self.result or {}).get("best_step")

    @property
    def never_improved(self) -> bool:
        """Whether even the best validation score is worse than the one before training."""
        metric = str(setting(self.config, "evaluation.metric"))
        before, best = self.scores("before").get(metric), self.scores("best").get(metric)
        return (
            before is not None and best is not None and self.better(metric, best, before) is False
        )

    @property
    def data(self) -> dict[str, Mapping[str, Any]]:
        """Record of the data of each split; empty if not recorded."""
        splits = _mapping(self.provenance.get("data"))
        return {split: one for split, one in splits.items() if isinstance(one, Mapping)}

    @property
    def data_digests(self) -> frozenset[tuple[str, str]]:
        """Digest of the source of each split."""
        return frozenset((split, str(one.get("sha256"))) for split, one in self.data.items())

    @property
    def validation_data(self) -> tuple[Any, Any] | None:
        """Digest of the validation data's source and number of its examples; None if not recorded.

        Both are needed: with `data.validation_fraction` the source is the training data.
        """
        data = self.data.get("validation")
        return (data.get("sha256"), data.get("examples")) if data else None

    @property
    def tokens_of_loss(self) -> tuple[Any, ...]:
        """What decides over which tokens the loss of text is a mean, besides the data; None where not recorded."""
        names = ("columns", "prompt_template", "completion_template", "encoding")
        settings = [setting(self.config, f"data.{name}") for name in names]
        if setting(self.config, "data.too_long") == "truncate":
            settings.append(setting(self.config, "data.max_length"))
        recorded = settings if self.config else None
        return self.base.get("tokenizer"), self.provenance.get("task"), recorded

    @property
    def memorisation(self) -> str:
        """How many validation examples are training examples too, as a sentence; "" if not recorded."""
        data = self.data.get("validation", {})
        count, repeated = data.get("examples"), data.get("training_examples")
        if not isinstance(count, int) or not isinstance(repeated, int):
            return ""
        if not repeated:
            return "None of its examples is used for training."
        return (
            f"{repeated:,} of its {counted(count, 'example')} are used for training too, so the scores partly measure "
            "memorisation."
        )

    @property
    def last_samples(self) -> list[Mapping[str, Any]]:
        """The samples of the latest evaluation that has any."""
        return [record for record in self.samples if record["step"] == self.samples[-1]["step"]]

    def scored_on(self, name: str) -> str:
        """Return how many validation examples or samples a score is of, such as "2 samples"; "" if not recorded."""
        if self.samples and name not in ("loss", "perplexity"):
            return counted(len(self.last_samples), "sample")
        _, count = self.validation_data or (None, None)
        limit = setting(self.config, "evaluation.limit")
        return counted(min(count, limit or count), "example") if isinstance(count, int) else ""

    def points(self, split: str, name: str) -> list[tuple[float, float]]:
        """Return the points (step, value) of a metric, without non-finite values."""
        records = self.train if split == "train" else self.validation
        return [
            (float(record["step"]), float(value))
            for record in records
            if isinstance(value := record.get(name), (int, float)) and math.isfinite(value)
        ]

    def scores(self, which: str) -> dict[str, float]:
        """Return the validation scores "before", "after" (the latest so far) or "best"."""
        scores: Mapping[str, Any] = {}
        if self.result is not None:
            key = {"before": "scores_before", "after": "scores", "best": "best_scores"}[which]
            scores = self.result.get(key) or {}
        elif self.validation and which == "after":
            scores = self.validation[-1]
        elif self.validation and which == "before" and self.validation[0].get("step") == 0:
            scores = self.validation[0]
        order = [*DIRECTIONS, *(name for name in scores if name not in DIRECTIONS)]  # loss first
        return {
            name: float(value)
            for name in order
            if name not in ("step", "split") and isinstance(value := scores.get(name), (int, float))
        }

    def better(self, name: str, new: float, old: float) -> bool | None:
        """Return whether a score improved from `old` to `new`; None if it did not change or has no known direction."""
        direction = self.directions.get(name)
        return None if new == old or direction is None else is_better(new, old, direction)

    def total(self, name: str) -> float | None:
        """Return the sum of "tokens", "computed_tokens" or "seconds" over all steps so far."""
        last = self.result if self.result is not None else (self.train[-1] if self.train else {})
        value = last.get(name)
        return float(value) if isinstance(value, (int, float)) else None


def read_run(folder: str | Path) -> RunRecord:
    """Read a run folder, finished or not.

    Raises:
        RunFolderError: The folder is not a run folder, or a file in it is damaged.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise RunFolderError(
            f"'{folder}' is not a run folder: it has no {CONFIG}. Use the output folder of `lorakit train`."
        )
    config = read_settings(folder)
    if not config:
        raise RunFolderError(
            f"'{folder / CONFIG}' is not the configuration of a run. Use the output folder of `lorakit train`."
        )
    metrics = [record for _, record in read_lines(folder / METRICS)]
    weights = sorted((folder / ADAPTER).glob("*.safetensors"))
    adapter = _record(folder / ADAPTER / LORAKIT_JSON, checked=False)
    return RunRecord(
        folder=folder,
        config=config,
        trained=_mapping(adapter.get("method")),
        result=_record(folder / RESULT) or None,
        sessions=_record(folder / ENVIRONMENT).get("sessions", []),
        train=[record for record in metrics if record.get("split") == "train"],
        validation=[record for record in metrics if record.get("split") == "validation"],
        samples=[record for _, record in read_lines(folder / SAMPLES)],
        events=_record(folder / EVENTS).get("events", []),
        provenance=_mapping(adapter.get("provenance")),
        base=_mapping(adapter.get("base")),
        predicted=_record(folder / PREDICTION),
        adapter_bytes=sum(path.stat().st_size for path in weights) if weights else None,
    )


def _record(path: Path, *, checked: bool = True) -> dict[str, Any]:
    if not path.is_file():
        return {}
    read = storage.read_record if checked else storage.read_json
    return read(path, RunFolderError)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
