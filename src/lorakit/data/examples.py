"""Load examples: read rows, map columns, tokenise, and count every row in a report."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

from lorakit.data.columns import ColumnMap
from lorakit.data.data_config import DataConfig, Split
from lorakit.data.report import Report, listing, stop_at_bad_rows
from lorakit.data.rows import Problem, Row
from lorakit.data.sources import DataRows, read_source
from lorakit.errors import DataError
from lorakit.tasks import (
    BadRow,
    Example,
    Fields,
    Kind,
    Labelled,
    RowError,
    Task,
    TooLong,
    UnknownLabel,
    task_type,
)
from lorakit.tasks.template_kwargs import with_template_kwargs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class DataTask:
    """Task and class labels of the data."""

    name: str
    """Task name as in `DataConfig.task`, with "auto" resolved."""
    labels: tuple[str, ...] = ()
    """Class names in index order; empty without classes."""

    @property
    def type(self) -> type[Task]:
        """Return the class of the task."""
        return task_type(self.name)

    @property
    def kind(self) -> Kind:
        """Return the kind of the model's output."""
        return self.type.kind

    @property
    def generates(self) -> bool:
        """Return whether the model's output is text."""
        return self.kind == "text"

    @property
    def has_references(self) -> bool:
        """Return whether generated text can be scored. Plain text has no prompts and references."""
        return self.generates and bool(self.type.scores)


@dataclass(kw_only=True)
class ExampleSet(Sequence[Example]):
    """The examples of one split, with their task, labels and source."""

    examples: list[Example]
    task: str
    """Task name, with "auto" resolved."""
    labels: tuple[str, ...]
    """Class names in index order; empty without classes."""
    report: Report
    sha256: str
    """Digest of the source's content."""
    format: str = ""
    """Format of the rows in a few words."""

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> Any:
        return self.examples[index]

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)

    @property
    def lengths(self) -> list[int]:
        """Return the number of tokens of each example."""
        return [len(example) for example in self.examples]

    def record(self) -> dict[str, Any]:
        """Return what a saved adapter records of this data."""
        report = self.report
        record = {"source": report.source, "sha256": self.sha256, "examples": len(self)}
        if report.in_train is not None:
            record["training_examples"] = report.in_train
        return record


class RowReader:
    """Reads each source once, although the task, the labels and several splits may need its rows."""

    def __init__(self) -> None:
        self._read: dict[tuple[Any, ...], DataRows] = {}
        self.by_split: dict[Split, list[Example]] = {}
        """The examples of each split that was loaded."""

    def read(self, config: DataConfig, split: Split) -> DataRows:
        """Return the rows of a split.

        Raises:
            DataError: The configuration has no such split, or it cannot be read.
        """
        source = config.source(split)
        if source is None:
            if config.own is not None:
                raise DataError(config.own.why_not(split))
            raise DataError(f"the configuration has no {split} data; set data.{split}")
        sources = (source,) if isinstance(source, str) else tuple(source)
        key = (sources, config.hub_split(split), config.limit)
        if key not in self._read:
            self._read[key] = read_source(source, config.hub_split(split), config.limit)
        return self._read[key]


def load_examples(
    config: DataConfig,
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    *,
    labels: Sequence[str] | None = None,
    reader: RowReader | None = None,
    is_encoder_decoder: bool = False,
) -> ExampleSet:
    """Return the examples of a split.

    Every split uses the task and class labels of the training set. Without a training set, they come from the split
    itself. When an adapter is evaluated, an explicit `task` and `labels` replace them. The model that reads the
    examples decides `is_encoder_decoder`: its completions are texts of their own.

    Raises:
        DataError: The data is missing or empty, its columns fit no task, a label is unknown, or a row is bad or too
            long and the configuration says stop. The message names files and lines.
    """
    reader = reader or RowReader()
    data = reader.read(config, split)
    columns = ColumnMap(config, data.columns, data.name)
    if labels is not None and config.task != "auto":
        resolved = DataTask(name=config.task, labels=tuple(labels))
    else:
        resolved = task_of(config, split, reader=reader)
    # Checks the columns of this split. It needs no rows, because the task is no longer "auto".
    task_class = columns.task(resolved.name, [])
    config = dataclasses.replace(config, task=resolved.name)  # checks the settings of some tasks
    task = task_class(
        with_template_kwargs(tokenizer, config.chat_template_kwargs),
        max_length=config.max_length,
        truncate=config.too_long == "truncate",
        labels=resolved.labels if labels is None else labels,
        encoding=config.encoding,
        is_encoder_decoder=is_encoder_decoder,
    )
    unread, count = columns.unread(task_class), len(data.rows)
    report = Report(source=data.name, rows=count, read=count, unread=unread)
    examples = [example for _, example in _encode(data, columns, task, task.encode, config, report)]
    if config.validation_fraction and split != "test":
        examples = _one_side(examples, config.validation_fraction, held_out=split == "validation")
        report.held_out = report.read - report.skipped - len(examples)
    if split == "validation" and (train := reader.by_split.get("train")) is not None:
        seen = {(example.key, example.completion) for example in train}
        report.in_train = sum((e.key, e.completion) in seen for e in examples)
    reader.by_split[split] = examples
    report.kept = len(examples)
    report.truncated = sum(example.truncated for example in examples)
    return ExampleSet(
        examples=examples,
        task=resolved.name,
        labels=task.labels,
        report=report,
        sha256=data.sha256,
        format=task_class.source_format(columns.fields_of(task_class), _fields(data, columns)),
    )


def load_unlabelled(
    config: DataConfig,
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    task: DataTask,
    reader: RowReader,
) -> tuple[list[dict[str, Any]], list[Example], Report]:
    """Return the rows to predict, with all of their columns, the example of each, and the report.

    Raises:
        DataError: The data is missing or empty, it lacks the texts of the task, or a row is bad or too long and the
            configuration says stop.
    """
    assert issubclass(task.type, Labelled)
    data = reader.read(config, split)
    columns = ColumnMap(config, data.columns, data.name)
    columns.check_inputs(task.type)
    encoder = task.type(
        tokenizer,
        max_length=config.max_length,
        truncate=config.too_long == "truncate",
        labels=task.labels,
    )
    report = Report(source=data.name, rows=len(data.rows), read=len(data.rows))
    pairs = list(_encode(data, columns, encoder, encoder.encode_unlabelled, config, report))
    report.kept = len(pairs)
    report.truncated = sum(example.truncated for _, example in pairs)
    return [row.values for row, _ in pairs], [example for _, example in pairs], report


def task_of(
    config: DataConfig, split: Split = "train", *, reader: RowReader | None = None
) -> DataTask:
    """Return task and labels of the training set, or of `split` without a training set. Needs no tokenizer.

    The model's head depends on them.

    Raises:
        DataError: The data is missing or unreadable, or its columns fit no task.
    """
    if config.own is not None and config.own.settles_labels:
        return DataTask(name=config.task, labels=config.own.task.classes)
    split = "train" if config.has("train") else split
    data = (reader or RowReader()).read(config, split)
    columns = ColumnMap(config, data.columns, data.name)
    task = columns.task(config.task, _fields(data, columns))
    declared = data.class_names.get(columns.column_of("label"), ())
    # A training set needs two labels; rows to score may have fewer.
    known = () if split == "train" else ({"label": label} for label in declared)
    labels = task.labels_of(chain(_fields(data, columns), known), declared)
    return DataTask(name=task.name if config.task == "auto" else config.task, labels=labels)


def task_class_of(config: DataConfig, *, reader: RowReader) -> type[Task]:
    """Return the class of the training set's task, without the labels, which need all of its rows.

    Raises:
        DataError: The data is missing or unreadable, or its columns fit no task.
    """
    if config.task_type is not None:
        return config.task_type
    data = reader.read(config, "train")
    columns = ColumnMap(config, data.columns, data.name)
    return columns.task(config.task, _fields(data, columns))


def _fields(data: DataRows, columns: ColumnMap) -> Iterator[dict[str, Any]]:
    for row in data.rows:
        if isinstance(row, Row):
            try:
                yield columns.apply(row.values)
            except BadRow:
                continue  # _encode reports the row


def _encode(
    data: DataRows,
    columns: ColumnMap,
    task: Task,
    encode: Callable[[Fields], Example],
    config: DataConfig,
    report: Report,
) -> Iterator[tuple[Row, Example]]:
    """Yield the valid rows with their examples, and add the other rows to `report`.

    With "stop", the error comes after the last row, so that one run reports all invalid rows.
    """
    valid = 0
    for row, split in zip(data.rows, data.splits, strict=True):
        if isinstance(row, Problem):
            report.bad.append(row)
            continue
        try:
            examples = list(columns.examples(row.values, task))
        except BadRow as error:
            report.bad.append(_problem(row, error, columns))
            continue
        report.read += len(examples) - 1  # a row may hold several examples, or none
        report.without += not examples
        for fields in examples:
            try:
                example = encode(fields)
            except UnknownLabel as error:
                raise DataError(str(_problem(row, error, columns))) from None
            except BadRow as error:
                report.bad.append(_problem(row, error, columns))
            except TooLong as error:
                report.too_long.append(_problem(row, error, columns))
                report.longest = max(report.longest, error.length)
            else:
                example.origin, example.split = row.origin, split
                example.may_be_cut = task.truncate
                valid += 1
                yield row, example
    stop_at_bad_rows(report, config)
    if report.too_long and config.too_long == "stop":
        raise DataError(
            f"{data.name}: {len(report.too_long):,} of {report.read:,} rows are longer than max_length "
            f"{config.max_length:,}, the longest with {report.longest:,} tokens",
            *listing(report.too_long),
            "Raise data.max_length, or set data.too_long to skip or truncate (--data.too_long truncate).",
        )
    if not valid:
        raise DataError(
            f"{data.name}: none of its {report.read:,} rows is valid",
            *listing(report.bad + report.too_long),
        )


def _problem(row: Row, error: RowError, columns: ColumnMap) -> Problem:
    if error.column is None:
        return Problem(row.origin, str(error))
    return Problem(row.origin, f"'{columns.column_of(error.column)}' {error.what}")


def _one_side(examples: list[Example], fraction: float, *, held_out: bool) -> list[Example]:
    """Return the validation side or the training side of the examples.

    A hash of the input's key picks the side. Several references for one input, and repeated rows, therefore stay on
    one side; on both sides they would make the validation loss too low. Other templates or rows give other sides.
    """
    keys = sorted(
        {example.key for example in examples},
        key=lambda key: hashlib.sha256(key.encode()).digest(),
    )
    if len(keys) < 2:
        raise DataError(
            "data.validation_fraction needs at least two distinct inputs; the data has one. Add rows, or set "
            "data.validation instead."
        )
    count = min(max(round(fraction * len(keys)), 1), len(keys) - 1)
    validation = set(keys[:count])
    return [example for example in examples if (example.key in validation) == held_out]


def evenly_spaced(items: Sequence[T], limit: int | None) -> Sequence[T]:
    """Return `limit` evenly spaced items, since neighbours in a file are often similar."""
    if limit is None or limit >= len(items):
        return items
    return [items[i * len(items) // limit] for i in range(limit)]
