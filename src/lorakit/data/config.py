"""Which data a run uses, and what to do with rows that do not fit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lorakit.configuration import conform
from lorakit.data.sources import BUILT_IN
from lorakit.data.templates import Template
from lorakit.errors import ConfigurationError, nearest, require_at_least, require_choice
from lorakit.tasks import TASKS

Split = Literal["train", "validation", "test"]

OPTIONAL_FIELDS = ("tools",)
FIELDS = (
    *dict.fromkeys(name for task in TASKS.values() for layout in task.layouts for name in layout),
    *OPTIONAL_FIELDS,
)
"""The names that `columns` can give a value to."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data to train and evaluate on."""

    train: str | list[str] | None = None
    """One or several of: a .jsonl, .json, .csv, .tsv or .parquet file (text formats also as .gz), a pattern
    (`data/part-*.jsonl`), a hub data set (`owner/name`, `owner/name:config`, `owner/name@revision`), or
    `docstrings`, which is built in and brings its own validation and test data. Training needs it;
    evaluation takes task and labels from it, and from the data that is scored where it is not given."""
    validation: str | list[str] | None = None
    """Data for the held-out loss while training; written like `train`."""
    test: str | list[str] | None = None
    """Data for the final scores; written like `train`."""
    validation_fraction: float = 0.0
    """Hold out this share of the distinct inputs of `train` for validation, instead of `validation`.
    Rows with the same input stay together."""
    train_split: str = "train"
    """The split of a hub data set to train on."""
    validation_split: str = "validation"
    """The split of a hub data set to validate on."""
    test_split: str = "test"
    """The split of a hub data set to test on."""
    task: str = "auto"
    """auto (by the columns), completion, chat, classification or regression."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our names for columns of the data: `{prompt: meaning_representation, completion: human_reference}`.
    Names are prompt, completion, messages, tools, text, sentence1, sentence2, label and score."""
    prompt_template: str | None = None
    """How a prompt is made of columns, for example `"Summarise:\\n{dialogue}\\nSummary:"`. Braces are
    written twice to stand for themselves."""
    completion_template: str | None = None
    """How a completion is made of columns, for example `" {summary}"`."""
    max_length: int = 512
    """Longest example, in tokens."""
    too_long: Literal["stop", "skip", "truncate"] = "stop"
    """What to do with longer ones. `truncate` cuts a prompt from its left and keeps the completion; a
    completion that is too long by itself loses its end; of two texts the longer one loses its end."""
    bad_rows: Literal["stop", "skip"] = "stop"
    """What to do with rows that have a missing, empty or wrongly typed field, or are not UTF-8."""
    limit: int | None = None
    """Read only the first rows of each set."""

    def __post_init__(self) -> None:
        conform(self, "data")
        require_choice("data.task", self.task, ("auto", *TASKS))
        for name in self.columns:
            if name not in FIELDS:
                raise ConfigurationError(
                    f"data.columns: {name!r} is not a name of ours; write `ours: theirs`, where ours is one of "
                    f"{', '.join(FIELDS)}." + nearest(name, FIELDS)
                )
        require_at_least("data.max_length", self.max_length, 2)
        if self.limit is not None:
            require_at_least("data.limit", self.limit, 1)
        if not 0 <= self.validation_fraction < 1:
            raise ConfigurationError(
                f"data.validation_fraction is {self.validation_fraction}; it must be at least 0 and below 1."
            )
        if self.validation_fraction and self.train is None:
            raise ConfigurationError(
                "data.validation_fraction takes part of data.train, and no data.train is named. Name it."
            )
        if self.validation_fraction and self.validation is not None:
            raise ConfigurationError(
                "Set data.validation or data.validation_fraction, not both: one names held-out data, the other takes "
                "some of data.train."
            )
        for option in ("prompt_template", "completion_template"):
            if (text := getattr(self, option)) is not None:
                Template(text, name=option)  # one that cannot be read is an error here already
                if self.task not in ("auto", "completion"):
                    raise ConfigurationError(
                        f"data.{option} is set, but task {self.task} has no {option.split('_')[0]}; remove one."
                    )

    def source(self, split: Split) -> str | list[str] | None:
        """Return what the configuration names for a split; None when it names nothing."""
        if split == "train" or (split == "validation" and self.validation_fraction):
            return self.train
        named = self.validation if split == "validation" else self.test
        if named is None and isinstance(self.train, str) and self.train in BUILT_IN:
            return self.train
        return named

    def hub_split(self, split: Split) -> str:
        """Return the name under which a hub data set holds a split."""
        if split == "validation" and self.validation_fraction:
            split = "train"
        return {
            "train": self.train_split,
            "validation": self.validation_split,
            "test": self.test_split,
        }[split]
