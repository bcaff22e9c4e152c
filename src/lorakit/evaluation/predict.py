"""Predict the labels or scores of rows that have none."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lorakit import storage
from lorakit.compute.adapted import AdapterFile, as_recorded, open_adapted, recorded_task
from lorakit.compute.base import check_context
from lorakit.compute.batch_size import BatchSize
from lorakit.compute.batching import collator
from lorakit.compute.computation import objective_for
from lorakit.compute.finite import why_not_finite
from lorakit.data import DataTask, RowReader
from lorakit.data.examples import load_unlabelled
from lorakit.errors import ConfigurationError, DataError, DivergenceError
from lorakit.evaluation.computed import computed, logits_of
from lorakit.evaluation.predict_config import PredictConfig
from lorakit.models.loading import Base
from lorakit.tasks import Example, Labelled


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """The rows with their predictions."""

    rows: list[dict[str, Any]]
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
    base = open_adapted(config.base, adapter, task=task, allow_other_base=config.allow_other_base)
    assert base.tokenizer is not None  # open_adapted rejects a base without one
    data, reader = dataclasses.replace(config.data, task=task.name), RowReader()
    data = as_recorded(data, adapter, reader.read(data, "test").columns)
    rows, examples, report = load_unlabelled(data, "test", base.tokenizer, task, reader)
    check_context(base, examples)
    _check_names(rows, report.source)
    logits = _logits(base, task, examples, config.batch_size)
    predictions = [
        {**row, **answer} for row, answer in zip(rows, _answers(logits, task.labels), strict=True)
    ]
    with storage.atomic_file(config.output) as temporary:
        # default=str: JSON has no dates, which Parquet has.
        lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in predictions)
        temporary.write_text("".join(lines), encoding="utf-8")
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


def _check_names(rows: Sequence[dict[str, Any]], source: str) -> None:
    """Reject columns that the predictions would replace."""
    for name in ("prediction", "probabilities"):
        if any(name in row for row in rows):
            raise DataError(
                f"{source} has a column {name!r}, which the output needs for the predictions; rename it."
            )


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
