"""Predict the labels or scores of rows that have none."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lorakit import storage
from lorakit.compute.adapted import open_adapted, tokenizer_of_adapted
from lorakit.compute.adapter_file import AdapterFile, as_recorded, recorded_task
from lorakit.compute.base import check_context
from lorakit.compute.batch_size import BatchSize
from lorakit.compute.batching import collator
from lorakit.compute.computation import objective_for
from lorakit.compute.finite import why_not_finite
from lorakit.data import DataConfig, DataTask, RowReader
from lorakit.data.examples import load_unlabelled
from lorakit.data.report import Report, stop_at_bad_rows
from lorakit.data.rows import Problem, Row
from lorakit.data.sources import DataRows
from lorakit.errors import ConfigurationError, DataError, DivergenceError
from lorakit.evaluation.computed import computed, logits_of
from lorakit.evaluation.predict_config import PredictConfig
from lorakit.models.loading import Base
from lorakit.tasks import BadRow, Example, Labelled
from lorakit.tasks.task import checked_text


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """The rows with their predictions."""

    rows: list[dict[str, Any]] = field(repr=False)
    """Columns of each row, `prediction`, and for classes `probabilities`: class name to a number from 0 to 1."""
    report: str
    """How many rows were read, skipped and truncated."""

    @property
    def counts(self) -> dict[str, int]:
        """Return the number of rows of each predicted class, the most frequent first; empty for regression."""
        names = (row["prediction"] for row in self.rows if "probabilities" in row)
        return dict(Counter(names).most_common())


def predict(config: PredictConfig) -> Predictions:
    """Predict the class or score of each row and write the rows to `config.output`, whole or not at all.

    Raises:
        LorakitError: The base, the adapter or the data cannot be read, or do not fit each other, or the output file
            exists.
    """
    storage.require_free_file(config.output, overwrite=config.overwrite)
    adapter = AdapterFile.read(config.adapter)
    assert adapter is not None  # there is a path
    task = _task(config, adapter)
    data, reader = dataclasses.replace(config.data, task=task.name), RowReader()
    rows = reader.read(data, "test")
    _make_writable(rows, data)
    data = as_recorded(data, adapter, rows.columns)
    tokenizer = tokenizer_of_adapted(config.base, adapter)
    values, examples, report = load_unlabelled(data, "test", tokenizer, task, reader)
    base = open_adapted(
        config.base,
        adapter,
        task=task,
        allow_other_base=config.allow_other_base,
        tokenizer=tokenizer,
    )
    check_context(base, examples)
    logits = _logits(base, task, examples, config.batch_size)
    predictions = [
        {**row, **answer} for row, answer in zip(values, _answers(logits, task.labels), strict=True)
    ]
    storage.write_rows(config.output, predictions, overwrite=config.overwrite)
    return Predictions(rows=predictions, report=str(report))


def _task(config: PredictConfig, adapter: AdapterFile) -> DataTask:
    """Return the task that the adapter was trained for."""
    named = None if config.data.task_type is None else config.data.task
    task = recorded_task(adapter, named)
    if task is None:
        raise ConfigurationError(
            f"The adapter {config.adapter} records no task, so its classes are unknown. Use an adapter that "
            "`lorakit train` wrote."
        )
    if not issubclass(task.type, Labelled):
        raise ConfigurationError(
            f"The adapter {config.adapter} was trained for task {task.name}, which has no labels. To generate text, "
            f"run lorakit generate --adapter {config.adapter} --file {config.data.test}."
        )
    if named not in (None, task.name):
        raise ConfigurationError(
            f"data.task is {named}, but the adapter {config.adapter} was trained for {task.name}. Leave data.task out."
        )
    return task


def _make_writable(data: DataRows, config: DataConfig) -> None:
    """Prepare the rows in place for a JSON file. Reject a column that a prediction would replace.

    NaN and infinities become null. A row that UTF-8 cannot hold becomes a problem, which the configuration may skip.
    """
    for name in ("prediction", "probabilities"):
        if name in data.columns:
            raise DataError(
                f"{data.name} has a column {name!r}, which the output needs for the predictions; rename it."
            )
    for i, row in enumerate(data.rows):
        if isinstance(row, Row):
            values = {name: storage.finite(value) for name, value in row.values.items()}
            try:
                for name, value in values.items():
                    checked_text(storage.json_line(value), name)
            except BadRow as error:
                data.rows[i] = Problem(row.origin, str(error))
            else:
                data.rows[i] = Row(values, row.origin)
    bad = [row for row in data.rows if isinstance(row, Problem)]
    stop_at_bad_rows(Report(source=data.name, read=len(data.rows), bad=bad), config)


def _logits(base: Base, task: DataTask, examples: Sequence[Example], batch_size: int) -> Tensor:
    """Return the logits (examples, outputs), in float32 on the CPU."""
    objective, collate = objective_for(base, task, examples), collator(base)
    logits = logits_of(
        computed(base.model, objective, examples, collate, batch_size=BatchSize(batch_size))
    )
    if not logits.isfinite().all():
        raise DivergenceError(f"The model's output is not finite: {why_not_finite(base.model)}")
    return logits


def _answers(logits: Tensor, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Return the predictions: a class with the probabilities of all classes, or a number."""
    if not labels:
        return [{"prediction": value} for value in logits.squeeze(-1).tolist()]
    return [
        {
            "prediction": labels[max(range(len(row)), key=row.__getitem__)],
            "probabilities": dict(zip(labels, row, strict=True)),
        }
        for row in logits.softmax(-1).tolist()
    ]
