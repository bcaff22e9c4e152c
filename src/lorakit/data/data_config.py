"""Which data a run uses, and what to do with rows that do not fit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lorakit.configuration import conform
from lorakit.data.own import OwnData
from lorakit.data.sources import BUILT_IN
from lorakit.data.templates import Template
from lorakit.errors import ConfigurationError, nearest, require_at_least, require_choice
from lorakit.tasks import GENERIC, Completion, Task, task_type

Split = Literal["train", "validation", "test"]

OPTIONAL_FIELDS = ("tools",)
FIELDS = (
    *dict.fromkeys(name for task in GENERIC.values() for layout in task.layouts for name in layout),
    *OPTIONAL_FIELDS,
)
"""The names that `columns` can give a value to."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data to train and evaluate on."""

    train: str | list[str] | None = None
    """One or several of: a .jsonl, .json, .csv, .tsv or .parquet file (text formats also as .gz), a pattern
    (`data/part-*.jsonl`), a hub data set (`owner/name`, `owner/name:config`, `owner/name@revision`), or
    `docstrings`, which is built in and brings its own validation and test data. By default the set of the named
    task. Training needs it; evaluation takes task and labels from it, and from the data that is scored where it
    is not given."""
    validation: str | list[str] | None = None
    """Data for the held-out loss while training; written like `train`."""
    test: str | list[str] | None = None
    """Data for the final scores; written like `train`."""
    validation_fraction: float = 0.0
    """Hold out this share of the distinct inputs of `train` for validation, instead of `validation`.
    Rows with the same input stay together."""
    train_split: str | None = None
    """The split of a hub data set to train on (train), or the name of a named task's file."""
    validation_split: str | None = None
    """The split of a hub data set to validate on (validation), or the name of a named task's file: MNLI has
    validation_matched and validation_mismatched, and takes both where both are there. A plus joins several."""
    test_split: str | None = None
    """The split of a hub data set to test on (test), or the name of a named task's file."""
    task: str = "auto"
    """auto (by the columns); completion, chat, classification or regression; or a named task, which knows its
    data: cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, e2e_nlg, webnlg, dart, wikisql or samsum; or one of your
    own, `path/to/file.py:Class`."""
    root: str | None = None
    """A folder with the data of named tasks, each in a sub-folder (`mrpc/train.jsonl`); without it they are read
    from the hub."""
    encoding: str | None = None
    """How a named task of texts writes a row: paper, as the LoRA paper's code does (the default), or prompt, as an
    instruction in words, which prompt_template may replace."""
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
        self._check_task()
        names = self._fields()
        for name in self.columns:
            if name not in names:
                raise ConfigurationError(
                    f"data.columns: {name!r} is not a name of ours; write `ours: theirs`, where ours is one of "
                    f"{', '.join(names)}." + nearest(name, names)
                )
        require_at_least("data.max_length", self.max_length, 2)
        if self.limit is not None:
            require_at_least("data.limit", self.limit, 1)
        if not 0 <= self.validation_fraction < 1:
            raise ConfigurationError(
                f"data.validation_fraction is {self.validation_fraction}; it must be at least 0 and below 1."
            )
        if self.validation_fraction and not self.has("train"):
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
                self._check_templates(option)

    def _check_task(self) -> None:
        task = self.task_type
        if self.root is not None and (task is None or task.data_set is None):
            raise ConfigurationError(
                f"data.root is {self.root!r}, a folder with the data of named tasks, but data.task is {self.task}. "
                "Name one, for example --data.task mrpc, or name files with data.train, validation and test."
            )
        if self.encoding is not None:
            known = () if task is None else task.encodings
            if not known:
                raise ConfigurationError(
                    f"data.encoding is {self.encoding!r}, but task {self.task} has no encodings; leave it out."
                )
            require_choice("data.encoding", self.encoding, known)

    def _check_templates(self, option: str) -> None:
        task = self.task_type
        if task is not None and not issubclass(task, Completion):
            raise ConfigurationError(
                f"data.{option} is set, but task {self.task} has no {option.split('_')[0]}; remove one."
            )
        if task is not None and task.encodings and self.encoding != "prompt":
            raise ConfigurationError(
                f"data.{option} is set, but the encoding is {self.encoding or task.encodings[0]}, which has none; set "
                "data.encoding to prompt."
            )

    def _fields(self) -> tuple[str, ...]:
        """The names that `columns` can give a value to."""
        task = self.task_type
        if task is None or task in GENERIC.values():
            return FIELDS
        return tuple(dict.fromkeys(name for layout in task.layouts for name in layout))

    @property
    def task_type(self) -> type[Task] | None:
        """The task that is named; None for "auto".

        Raises:
            ConfigurationError: There is no such task.
        """
        return None if self.task == "auto" else task_type(self.task)

    @property
    def own(self) -> OwnData | None:
        """The data that a named task brings; None for other tasks."""
        task = self.task_type
        if task is None or task.data_set is None:
            return None
        return OwnData(task=task, root=self.root)

    def has(self, split: Split) -> bool:
        """Whether data of a split is named, or belongs to a named task, without looking whether it is there."""
        if split == "validation" and self.validation_fraction:
            return True
        if self._named(split) is not None:
            return True
        return self.own is not None and bool(self.own.names(split, self._chosen(split)))

    def source(self, split: Split) -> str | list[str] | None:
        """Return what the configuration, or a named task, has for a split; None when that is nothing.

        Raises:
            DataError: The folder of a named task, or a split of it that is named, is not there.
        """
        if split == "validation" and self.validation_fraction:
            split = "train"
        named = self._named(split)
        if named is None and self.own is not None:
            return self.own.source(split, self._chosen(split))
        return named

    def hub_split(self, split: Split) -> str:
        """Return the name under which a hub data set holds a split."""
        if split == "validation" and self.validation_fraction:
            split = "train"
        if chosen := self._chosen(split):
            return chosen
        if self._named(split) is None and self.own is not None:
            return next(iter(self.own.names(split)), split)
        return split

    def _named(self, split: Split) -> str | list[str] | None:
        named = {"train": self.train, "validation": self.validation, "test": self.test}[split]
        if named is None and isinstance(self.train, str) and self.train in BUILT_IN:
            return self.train
        return named

    def _chosen(self, split: Split) -> str | None:
        return {
            "train": self.train_split,
            "validation": self.validation_split,
            "test": self.test_split,
        }[split]
