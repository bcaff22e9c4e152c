"""One run of a grid: its settings, its folder, and what is written down of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lorakit import storage
from lorakit.data import DataConfig
from lorakit.errors import LorakitError, RunFolderError
from lorakit.evaluation.config import BaseConfig, Decoding, EvaluateConfig
from lorakit.evaluation.evaluate import evaluate
from lorakit.metrics import WITHOUT_JAVA
from lorakit.paper.paper_config import PaperConfig
from lorakit.paper.settings import train_config
from lorakit.paper.study import StudyData, Variant
from lorakit.tasks.registry import task_type
from lorakit.training.config import TrainConfig
from lorakit.training.loop import train

WARMUP = 0.06
"""Share of the steps over which the rate rises: the paper's for RoBERTa."""
HELD_OUT_LABELS, HELD_OUT_TEXTS = 1_000, 300
"""Held-out examples scored at most: for labels, and for texts, which are longer."""
EVALUATIONS = 5
"""Evaluations on held-out data in a run whose length is a number of steps."""
FALLBACK_EPOCHS = 3.0
HELD_OUT_SHARE = 0.1


Measure = Callable[[Path, BaseConfig], dict[str, float]]
"""From the folder of an adapter and its base to numbers by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TableRun:
    """One training run of a grid."""

    data_set: StudyData
    variant: Variant
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Its folder below ``runs/``."""
        return f"{self.data_set.key}/{self.variant.key}/rate-{self.rate:g}-seed-{self.seed}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What is kept of a finished run."""

    data_set: str
    variant: str
    rate: float
    seed: int
    steps: int
    best_step: int | None
    held_out: dict[str, float]
    """Scores on held-out data at the best step: what choices are made by."""
    seconds: float
    """Time in training steps."""
    peak_memory: int
    tokens: int
    """Tokens of the examples of all steps."""
    failure: str = ""
    """Why there are no scores: training diverged."""
    scores: dict[str, float] = field(default_factory=dict)
    """Scores on the data that the table is about; empty for a trial whose rate was not chosen."""

    def score(self, name: str) -> float | None:
        """Return a score, computed with Java or without; None where there is none."""
        return self.scores.get(name, self.scores.get(f"{name}{WITHOUT_JAVA}"))


class Runner:
    """Makes the runs of a grid, each once.

    Args:
        config: What was asked for.
        steps: Steps of a run, by data set, where they come from a budget.
        training: Training data, by data set, where it is not that of the task.
        held_out: Share of the training data that is held out, by data set.
        amplification: Measures what an adapter amplifies in its base, for the table of it.
    """

    def __init__(
        self,
        config: PaperConfig,
        *,
        steps: Mapping[str, int],
        training: Mapping[str, str],
        held_out: Mapping[str, float],
        amplification: Measure | None = None,
    ) -> None:
        self.config, self.amplification = config, amplification
        self.steps, self.training, self.held_out = steps, training, held_out
        self.folder = config.folder / "runs"

    def settings(self, run: TableRun) -> dict[str, Any]:
        """Return the settings of a run by dotted name."""
        config, data_set = self.config, run.data_set
        labels = task_type(data_set.task).kind != "text"
        settings: dict[str, Any] = {
            "base.name": config.base.name,
            "base.dtype": config.dtype,
            "base.device": config.device,
            "data.task": data_set.task,
            "data.root": config.data,
            "data.max_length": data_set.max_length,
            "data.too_long": "truncate",
            "output": str(self.folder / run.name),
            "seed": run.seed,
            "batch_size": config.batch_size,
            "optimizer.learning_rate": run.rate,
            "optimizer.warmup": WARMUP,
            "evaluation.metric": data_set.metric,
            "evaluation.limit": HELD_OUT_LABELS if labels else HELD_OUT_TEXTS,
            "evaluation.batch_size": max(config.batch_size, 32),
            "checkpoints.keep": 1,
            "epochs": config.epochs or FALLBACK_EPOCHS,
            "resume": True,
            **run.variant.settings,
        }
        if data_set.key in self.training:
            settings["data.train"] = self.training[data_set.key]
        if share := self.held_out.get(data_set.key):
            settings["data.validation_fraction"] = share
        if (steps := self.steps.get(data_set.key)) is not None:
            settings["max_steps"] = steps
            settings["evaluation.every"] = max(1, -(-steps // EVALUATIONS))
        return settings

    def train_config(self, run: TableRun) -> TrainConfig:
        """Return the configuration of a run."""
        return train_config(self.settings(run))

    def record(self, run: TableRun) -> Record | None:
        """Return what was written down of a run; None where it has not ended.

        Raises:
            RunFolderError: The record is damaged.
        """
        path = self._path(run)
        if not path.exists():
            return None
        found = storage.read_record(path, RunFolderError)
        known = Record.__dataclass_fields__
        if not found.keys() <= known.keys():
            raise RunFolderError(
                f"'{path}' was written by another version of lorakit. Choose another output folder."
            )
        return Record(**found)

    def finish(self, run: TableRun, *, scored: bool) -> Record:
        """Train, or go on training; with `scored`, score the best adapter as well. What is done is not done again.

        Raises:
            LorakitError: Something that no other run would do better either: data, base, disk.
        """
        done = self.record(run)
        if done is None:
            done = self._train(run)
        if scored and not done.scores and not done.failure:
            done = self._score(run, done)
        return done

    def drop_weights(self, run: TableRun) -> None:
        """Delete the adapters of a run, whose record stays."""
        for name in ("checkpoints", "best", "adapter"):
            with suppress(OSError):
                shutil.rmtree(self.folder / run.name / name)

    def _train(self, run: TableRun) -> Record:
        try:
            result = train(self.train_config(run))
        except LorakitError as error:
            if type(error) is not LorakitError:  # its kinds are about settings, files and data
                raise
            return self._write(run, _record(run, failure=str(error)))
        with suppress(OSError):
            shutil.rmtree(self.folder / run.name / "checkpoints")
        return self._write(
            run,
            _record(
                run,
                steps=result.steps,
                best_step=result.best_step,
                held_out=result.best_scores,
                seconds=result.seconds,
                peak_memory=result.peak_memory,
                tokens=result.tokens,
            ),
        )

    def _score(self, run: TableRun, done: Record) -> Record:
        folder = self.folder / run.name
        if self.config.study.measures == "amplification":
            assert self.amplification is not None
            measured = self.amplification(folder / "best", self.config.base)
            return self._write(run, Record(**{**asdict(done), "scores": measured}))
        evaluation = evaluate(self.evaluate_config(run.data_set, folder / "best"))
        if task_type(run.data_set.task).kind == "text":
            evaluation.write_outputs(folder.with_name(f"{folder.name}-outputs.jsonl"))
        return self._write(run, Record(**{**asdict(done), "scores": evaluation.scores}))

    def evaluate_config(self, data_set: StudyData, adapter: Path) -> EvaluateConfig:
        """Return how an adapter is scored on the data that the table is about."""
        config = self.config
        return EvaluateConfig(
            data=DataConfig(
                task=data_set.task,
                root=config.data,
                max_length=data_set.max_length,
                too_long="truncate",
                validation_split=data_set.scored,
            ),
            base=config.base,
            adapter=str(adapter),
            limit=config.eval_limit,
            batch_size=32,
            decoding=Decoding(beams=config.beams),
        )

    def _write(self, run: TableRun, record: Record) -> Record:
        with storage.atomic_file(self._path(run)) as temporary:
            storage.write_record(temporary, asdict(record))
        return record

    def _path(self, run: TableRun) -> Path:
        folder = self.folder / run.name
        return folder.with_name(f"{folder.name}.json")


def _record(run: TableRun, **values: Any) -> Record:
    empty: dict[str, Any] = {
        "steps": 0,
        "best_step": None,
        "held_out": {},
        "seconds": 0.0,
        "peak_memory": 0,
        "tokens": 0,
    }
    return Record(
        data_set=run.data_set.key,
        variant=run.variant.key,
        rate=run.rate,
        seed=run.seed,
        **{**empty, **values},
    )
