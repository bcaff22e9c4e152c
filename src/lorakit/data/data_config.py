"""Configuration of the data of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from lorakit.configuration import LocalPath, conform, strict
from lorakit.data.own import OwnData
from lorakit.data.sources import BUILT_IN, has_splits
from lorakit.data.templates import Template
from lorakit.errors import ConfigurationError, nearest, require_at_least, require_choice
from lorakit.tasks import GENERIC, Chat, Completion, Task, task_type
from lorakit.tasks.template_kwargs import check_template_kwargs

Split = Literal["train", "validation", "test"]

OPTIONAL_FIELDS = ("input", "system", "history", "tools")
"""Fields of generic tasks that rows need not have."""
FIELDS = (
    *dict.fromkeys(name for task in GENERIC.values() for layout in task.layouts for name in layout),
    *OPTIONAL_FIELDS,
)
"""Fields that `columns` can map to a column."""


@strict
@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data for training and evaluation."""

    train: str | list[str] | None = None
    """Training data, one source or a list: a .jsonl, .json, .csv, .tsv or .parquet file (text formats also as .gz), a
    glob pattern (`data/part-*.jsonl`), a hub data set (`owner/name`, `owner/name:config`, `owner/name@revision`), or
    the built-in `docstrings`, which includes validation and test data. Defaults to the data of the named task.
    Required for training. An evaluation needs it only for a base without an adapter that records its task: it then
    reads task and labels from it, or without it from the scored data."""
    validation: str | list[str] | None = None
    """Data for the validation loss during training; same forms as `train`."""
    test: str | list[str] | None = None
    """Data for the final scores; same forms as `train`."""
    validation_fraction: float = 0.0
    """Hold out this share of the distinct inputs of `train` for validation, instead of `validation`.
    Rows with the same input stay together."""
    train_split: str | None = None
    """Split of a hub data set to train on (default: train), or the file name of a named task's split."""
    validation_split: str | None = None
    """Split of a hub data set to validate on (default: validation), or the file name of a named task's split. MNLI
    has validation_matched and validation_mismatched, and uses both if both exist. A plus joins several splits."""
    test_split: str | None = None
    """Split of a hub data set to test on (default: test), or the file name of a named task's split."""
    task: str = "auto"
    """auto (chosen by the columns); a generic task: completion, chat, text (language modelling), classification or
    regression; a named task with its own data: cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, e2e_nlg, webnlg, dart,
    wikisql or samsum; or a class of yours, `path/to/file.py:Class`."""
    root: LocalPath | None = None
    """Folder with the data of named tasks, one sub-folder per task (`mrpc/train.jsonl`). Omit to read them from the
    hub."""
    encoding: str | None = None
    """Text format of a named text task: paper, the format of the LoRA paper's code (the default), or prompt, an
    instruction in words, which prompt_template can replace."""
    columns: dict[str, str] = field(default_factory=dict)
    """Column for each field: `{prompt: meaning_representation, completion: human_reference}`.
    Fields are prompt, completion, messages, system, tools, instruction, input, output, history, text, sentence1,
    sentence2, label and score."""
    prompt_template: str | None = None
    """Template of the prompt, filled from columns, for example `"Summarise:\\n{dialogue}\\nSummary:"` in YAML; in a
    shell, quote a line feed with `$'...'`. Double the braces for literal ones."""
    completion_template: str | None = None
    """Template of the completion, filled from columns, for example `" {summary}"`."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables of the chat template: `{enable_thinking: false}`. They are saved in the template of the adapter's
    tokenizer, so later prompts are rendered as in training."""
    max_length: int = 512
    """Maximum number of tokens in an example."""
    too_long: Literal["stop", "skip", "truncate"] = "stop"
    """How to handle longer examples. `truncate` cuts the prompt from its left and keeps the completion. A completion
    that is too long by itself loses its end; of a pair of texts the longer one loses its end."""
    bad_rows: Literal["stop", "skip"] = "stop"
    """How to handle rows with a missing, empty or wrongly typed field, and rows that are not UTF-8."""
    limit: int | None = None
    """Read only this many rows of each split."""

    def __post_init__(self) -> None:
        conform(self, "data")
        self._check_task()
        names = self._fields()
        for name in self.columns:
            if name not in names:
                raise ConfigurationError(
                    f"data.columns: unknown field {name!r}; write `field: column`, where field is one of "
                    f"{', '.join(names)}." + nearest(name, names)
                )
        require_at_least("data.max_length", self.max_length, 2)
        require_at_least("data.limit", self.limit, 1)
        require_at_least("data.validation_fraction", self.validation_fraction, 0, below=1)
        if self.validation_fraction and not self.has("train"):
            raise ConfigurationError(
                "data.validation_fraction holds out part of data.train, but data.train is not set. Set data.train."
            )
        if self.validation_fraction and self.validation is not None:
            raise ConfigurationError(
                "Set data.validation or data.validation_fraction, not both: one names the validation data, the other "
                "holds out part of data.train."
            )
        self._check_splits()
        check_template_kwargs(self.chat_template_kwargs, "data.chat_template_kwargs")
        for option in ("prompt_template", "completion_template"):
            if (text := getattr(self, option)) is not None:
                template = Template(text, name=option)  # raises for a malformed template
                self._check_templates(option)
                if option == "completion_template" and not template.fields:
                    raise ConfigurationError(
                        f"data.completion_template is {text!r}, without a column, so all rows would have the same "
                        "completion. Write the name of a column in braces, for example {completion}."
                    )

    @property
    def template_notes(self) -> list[str]:
        r"""Sentences about templates with the two characters "\n", which a shell leaves in double quotes."""
        return [
            f"{name} contains a backslash and an n, not a line feed; quote the template with double quotes in YAML, "
            "with $'...' in a shell"
            for name in ("prompt_template", "completion_template")
            if "\\n" in (getattr(self, name) or "")
        ]

    def _check_task(self) -> None:
        task = self.task_type
        if self.root is not None and (task is None or task.data_set is None):
            raise ConfigurationError(
                f"data.root is {self.root!r}, a folder with the data of named tasks, but data.task is {self.task}. "
                "Set data.task to a named task, for example --data.task mrpc, or set data.train, data.validation and "
                "data.test to files."
            )
        if self.encoding is not None:
            encodings = () if task is None else task.encodings
            if not encodings:
                raise ConfigurationError(
                    f"data.encoding is {self.encoding!r}, but task {self.task} has no encodings; remove it."
                )
            require_choice("data.encoding", self.encoding, encodings)

        if self.chat_template_kwargs and task is not None and not issubclass(task, Chat):
            raise ConfigurationError(
                f"data.chat_template_kwargs is set, but task {self.task} uses no chat template; remove it, or set "
                "data.task to chat."
            )

    def _check_splits(self) -> None:
        """Reject the name of a split whose source has no splits, or that no source uses."""
        for split in get_args(Split):
            name, source = self._configured_split_name(split), self._configured_source(split)
            if not name:
                continue
            found = f"data.{split}_split is {name!r}"
            if split == "validation" and self.validation_fraction:
                raise ConfigurationError(
                    f"{found}, but data.validation_fraction takes the validation data from data.train, whose split is "
                    "data.train_split. Remove one of the two."
                )
            if source is None:
                # `lorakit evaluate` reads the task from the adapter, and a named task brings its data.
                may_bring_data = self.task == "auto" and self.train is None and split != "train"
                if self.own is not None or may_bring_data:
                    continue
                with_splits = isinstance(self.train, str) and has_splits(self.train)
                example = self.train if with_splits else "owner/name"
                raise ConfigurationError(
                    f"{found}, but data.{split} is not set. Set data.{split} to the data set that has this split, for "
                    f"example --data.{split} {example}."
                )
            if not any(map(has_splits, [source] if isinstance(source, str) else source)):
                raise ConfigurationError(
                    f"{found}, but data.{split} is {source!r:.100}, and files have no splits. Remove "
                    f"data.{split}_split or set it to null; data.limit reads the first rows of a file."
                )

    def _check_templates(self, option: str) -> None:
        task = self.task_type
        if task is not None and not issubclass(task, Completion):
            raise ConfigurationError(
                f"data.{option} is set, but task {self.task} has no {option.split('_')[0]}; remove one."
            )
        if task is not None and task.encodings and self.encoding != "prompt":
            raise ConfigurationError(
                f"data.{option} is set, but the encoding is {self.encoding or task.encodings[0]}, which uses no "
                "template; set data.encoding to prompt."
            )

    def _fields(self) -> tuple[str, ...]:
        """Return the fields that `columns` can map to a column."""
        task = self.task_type
        if task is None or task in GENERIC.values():
            return FIELDS
        return tuple(dict.fromkeys(name for layout in task.layouts for name in layout))

    @property
    def task_type(self) -> type[Task] | None:
        """Return the class of `task`; None for "auto".

        Raises:
            ConfigurationError: The task does not exist.
        """
        return None if self.task == "auto" else task_type(self.task)

    @property
    def own(self) -> OwnData | None:
        """Return the data of the named task; None for other tasks."""
        task = self.task_type
        if task is None or task.data_set is None:
            return None
        return OwnData(task=task, data_set=task.data_set, root=self.root)

    def names(self, split: Split) -> bool:
        """Return whether the configuration itself names the data of a split."""
        return self._configured_source(split) is not None

    def has(self, split: Split) -> bool:
        """Return whether the configuration or the named task has data for a split. Does not look for its files."""
        if split == "validation" and self.validation_fraction:
            return True
        if self.names(split):
            return True
        return self.own is not None and bool(
            self.own.names(split, self._configured_split_name(split))
        )

    def source(self, split: Split) -> str | list[str] | None:
        """Return the files or data set of a split, from the configuration or the named task; None without any.

        Raises:
            DataError: The folder of the named task, or a split that the configuration names, is missing.
        """
        if split == "validation" and self.validation_fraction:
            split = "train"
        source = self._configured_source(split)
        if source is None and self.own is not None:
            return self.own.source(split, self._configured_split_name(split))
        return source

    def hub_split(self, split: Split) -> str:
        """Return the name of a split in its hub data set."""
        if split == "validation" and self.validation_fraction:
            split = "train"
        if name := self._configured_split_name(split):
            return name
        if self._configured_source(split) is None and self.own is not None:
            return next(iter(self.own.names(split)), split)
        return split

    def _configured_source(self, split: Split) -> str | list[str] | None:
        """Return the source that the configuration sets; a built-in data set in `train` has all splits."""
        source = getattr(self, split)
        if source is None and isinstance(self.train, str) and self.train in BUILT_IN:
            return self.train
        return source

    def _configured_split_name(self, split: Split) -> str | None:
        return getattr(self, f"{split}_split")
