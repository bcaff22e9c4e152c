"""Train and score the runs of a grid, each in its folder."""

from __future__ import annotations

import functools
import hashlib
import shutil
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lorakit import storage
from lorakit.configuration import conform, nested
from lorakit.data import DataConfig
from lorakit.errors import ConfigurationError, DivergenceError, RunFolderError
from lorakit.evaluation.evaluate import check_evaluation, evaluate
from lorakit.evaluation.evaluate_config import EvaluateConfig
from lorakit.file_names import ADAPTER, BEST, CHECKPOINTS, ENVIRONMENT, METRICS, RESULT
from lorakit.models.base_config import BaseConfig
from lorakit.models.devices import pick_device
from lorakit.models.float32_products import onednn_is_faster
from lorakit.models.processor import processor_name
from lorakit.paper.log import GridSetup
from lorakit.paper.paper_config import PaperConfig
from lorakit.paper.record import Record, recorded_settings
from lorakit.paper.resampling import as_lines
from lorakit.paper.study import StudyData, Variant
from lorakit.tasks.registry import task_type
from lorakit.training.config import TrainConfig
from lorakit.training.environment import environment, versions
from lorakit.training.loop import train
from lorakit.training.run_folder import read_lines

WARMUP = 0.06
"""Warm-up as a share of the steps: the paper's value for RoBERTa."""
HELD_OUT_LABELS, HELD_OUT_TEXTS = 1_000, 300
"""Most held-out examples to score: of tasks with labels, and of tasks with texts, which are longer."""
EVALUATIONS = 5
"""Evaluations on held-out data in a run with a fixed number of steps."""
FALLBACK_EPOCHS = 3.0
CHECKPOINT_STEPS = 200
"""An interruption costs at most this many steps: some ten minutes on a laptop."""
HELD_OUT_SHARE = 0.1

_ADDED = {"threads", "device", "source", "scored", "cut", "sums"}
"""Fields that the records of earlier versions lack."""

Measure = Callable[[Path, BaseConfig], dict[str, float]]
"""Maps an adapter folder and its base to numbers by name: how an adapter amplifies its base, for table 7."""
Say = Callable[[str], None]
"""Prints a line of progress."""


def require_measure(config: PaperConfig, amplification: Measure | None) -> None:
    """Require the measure of a table whose numbers are amplifications, before a run is trained.

    Raises:
        ConfigurationError: It is missing.
    """
    if config.study.measures == "amplification" and amplification is None:
        raise ConfigurationError(
            f"amplification is not set, and {config.table} consists of its numbers. Set it to "
            f"lorakit.analysis.table7_row, or run: lorakit paper {config.table}."
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TableRun:
    """One training run of a grid."""

    data_set: StudyData
    variant: Variant
    rate: float
    seed: int
    trial_epochs: float | None = None
    """Length of a run that only chooses the learning rate; None for one that can be scored."""

    @property
    def name(self) -> str:
        """Its folder below ``runs/``."""
        purpose = "trial" if self.trial_epochs else f"seed-{self.seed}"
        return f"{self.data_set.key}/{self.variant.key}/rate-{self.rate:g}-{purpose}"


class Runner:
    """Trains and scores the runs of a grid, each once."""

    def __init__(
        self, config: PaperConfig, setup: GridSetup, amplification: Measure | None = None
    ) -> None:
        self.config, self.setup, self.amplification = config, setup, amplification
        self.folder = config.folder / "runs"
        self.records = config.log_folder / "runs"
        self.source = _source()

    def settings(self, run: TableRun) -> dict[str, Any]:
        """Return the settings of a run by dotted name."""
        config, data_set = self.config, run.data_set
        labels = task_type(data_set.task).kind != "text"
        settings: dict[str, Any] = {
            **{f"base.{name}": value for name, value in asdict(config.base).items()},
            "data.task": data_set.task,
            "data.root": config.data.root,
            "data.max_length": data_set.max_length,
            "data.too_long": "truncate",
            "output": str(self.folder / run.name),
            "seed": run.seed,
            "batch_size": config.batch_size,
            "sampling": config.sampling,
            "optimizer.learning_rate": run.rate,
            "optimizer.warmup": WARMUP,
            "evaluation.metric": data_set.metric,
            "evaluation.limit": HELD_OUT_LABELS if labels else HELD_OUT_TEXTS,
            "evaluation.batch_size": max(config.batch_size, 32),
            "checkpoints.every": CHECKPOINT_STEPS,
            "checkpoints.keep": 1,
            "epochs": run.trial_epochs or config.epochs or FALLBACK_EPOCHS,
            "resume": True,
            **run.variant.settings,
        }
        if data_set.key in self.setup.training:
            settings["data.train"] = str(config.drawn_data / self.setup.training[data_set.key])
        if share := self.setup.held_out.get(data_set.key):
            settings["data.validation_fraction"] = share
        if (steps := self.setup.steps.get(data_set.key)) is not None:
            settings["max_steps"] = steps
            settings["evaluation.every"] = max(1, -(-steps // EVALUATIONS))
        return settings

    def train_config(self, run: TableRun) -> TrainConfig:
        """Return the configuration of a run."""
        return TrainConfig(**nested(self.settings(run)))

    def conditions(self) -> dict[str, Any]:
        """Return the fields of a record that describe this process: processor, device, threads, versions and source."""
        here = environment(pick_device(self.config.base.device))
        return {
            "processor": here["processor"],
            "device": device_name(here["device"]),
            "threads": [here["threads"]],
            "versions": here["versions"],
            "source": self.source,
        }

    def record(self, run: TableRun) -> Record | None:
        """Return the record of a run; None if the run has not finished.

        Raises:
            RunFolderError: The record is damaged or of another run, or another version of lorakit wrote it.
        """
        path = self._path(run)
        if not path.exists():
            return None
        values = storage.read_record(path, RunFolderError)
        if values.keys() | _ADDED != Record.__dataclass_fields__.keys():
            raise RunFolderError(
                f"Another version of lorakit wrote '{path}'. Choose another folder with --output."
            )
        record = Record(**values)
        try:
            conform(record)
        except ConfigurationError as error:
            raise RunFolderError(
                f"'{path}' is damaged: {error} Restore the file, or delete it to train this run again."
            ) from None
        key = (record.data_set, record.variant, record.rate, record.seed)
        if key != (run.data_set.key, run.variant.key, run.rate, run.seed):
            data_set, variant, rate, seed = key
            raise RunFolderError(
                f"'{path}' holds the record of {data_set}/{variant} with rate {rate} and seed {seed}. Restore the "
                f"record of {run.name}, or delete the file to train this run again."
            )
        return record

    def finish(self, run: TableRun, *, scored: bool) -> Record:
        """Train a run or resume its training; with `scored`, also score its best adapter. Skip finished parts.

        Raises:
            LorakitError: The data, the base or the disk fails, as it would for every run.
        """
        record = self.record(run)
        needs_scores = scored and (record is None or record.lacks_scores)
        # A log is kept where weights are not: on another machine a run is trained again to be scored. Test for both:
        # an evaluation that fails leaves adapter/ without result.json, and `delete_weights` the reverse.
        trained = all((self.folder / run.name / name).exists() for name in (ADAPTER, RESULT))
        if record is None or (needs_scores and not trained):
            record = self._train(run)
        if needs_scores and not record.failure:
            began = time.process_time()
            fields = self._score(run)
            spent = record.processor_seconds + time.process_time() - began
            record = replace(record, **fields, processor_seconds=round(spent, 3))
            if record.threads:
                here = torch.get_num_threads()
                record = replace(record, threads=list(dict.fromkeys([*record.threads, here])))
            self._write(run, record)
        return record

    def delete_weights(self, run: TableRun) -> None:
        """Delete the adapters of a run and keep its record."""
        # adapter/ first: an interruption then leaves a run that is trained again.
        for name in (ADAPTER, BEST, CHECKPOINTS):
            shutil.rmtree(self.folder / run.name / name, ignore_errors=True)

    def _train(self, run: TableRun) -> Record:
        config = self.train_config(run)
        record = Record(
            data_set=run.data_set.key,
            variant=run.variant.key,
            rate=run.rate,
            seed=run.seed,
            settings=recorded_settings(config),
            processor=processor_name(),
            versions=versions(),
            source=self.source,
        )
        folder = self.folder / run.name
        began = time.process_time()
        try:
            result = train(config)
        except DivergenceError as error:
            metrics = _read_metrics(folder)
            last = next((line for line in reversed(metrics) if line["split"] == "train"), {})
            record = replace(
                record,
                failure=str(error),
                steps=last.get("step", 0),
                seconds=last.get("seconds", 0.0),
                tokens=last.get("tokens", 0),
                processor_seconds=round(time.process_time() - began, 3),
            )
        else:
            metrics = _read_metrics(folder)
            record = replace(
                record,
                steps=result.steps,
                best_step=result.best_step,
                held_out=result.best_scores,
                seconds=result.seconds,
                processor_seconds=result.processor_seconds,
                inputs=result.inputs,
                peak_memory=result.peak_memory,
                tokens=result.tokens,
            )
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        return self._write(run, replace(record, curve=_curve(metrics), **_sessions(folder)))

    def _score(self, run: TableRun) -> dict[str, Any]:
        """Score the best adapter of a run, and return the fields of its record."""
        folder = self.folder / run.name
        if self.config.study.measures == "amplification":
            assert self.amplification is not None
            return {"scores": self.amplification(folder / BEST, self.config.base)}
        evaluation = evaluate(self.evaluate_config(run.data_set, folder / BEST))
        limit = self.config.eval_limit
        if task_type(run.data_set.task).kind == "text":
            evaluation.write_outputs(folder.with_name(f"{folder.name}-outputs.jsonl"))
        return {
            "scores": evaluation.scores,
            "scored": evaluation.sha256 if limit is None else f"{evaluation.sha256} {limit}",
            "cut": evaluation.cut,
            "sums": {
                column.score: as_lines(column.sums.of(evaluation.outputs))
                for column in run.data_set.columns
                if column.sums is not None
            },
        }

    def check_scoring(self, data_set: StudyData) -> None:
        """Check before a run is trained that its data can be scored.

        Raises:
            LorakitError: The data cannot be read, or a package of the scores is missing.
        """
        if self.config.study.measures != "amplification":
            check_evaluation(self.evaluate_config(data_set, None))

    def evaluate_config(self, data_set: StudyData, adapter: Path | None) -> EvaluateConfig:
        """Return the configuration that scores an adapter, or the bare base, on the table's data."""
        config = self.config
        return EvaluateConfig(
            data=DataConfig(
                task=data_set.task,
                root=config.data.root,
                max_length=data_set.max_length,
                too_long="truncate",
                validation_split=data_set.scored,
            ),
            base=config.base,
            adapter=None if adapter is None else str(adapter),
            compare=False,
            limit=config.eval_limit,
            batch_size=32,
            decoding=config.decoding,
        )

    def _write(self, run: TableRun, record: Record) -> Record:
        with storage.atomic_file(self._path(run)) as temporary:
            storage.write_record(temporary, asdict(record))
        return record

    def _path(self, run: TableRun) -> Path:
        folder = self.records / run.name
        return folder.with_name(f"{folder.name}.json")


@functools.cache
def _source() -> str:
    """Return a digest of lorakit's source files, taken before the first run: the files can change during a grid."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()} {storage.sha256(path)}\n".encode())
    return digest.hexdigest()


def _sessions(folder: Path) -> dict[str, Any]:
    """Return the threads and the device of a run's sessions, each value once; nothing if it failed before its start."""
    path = folder / ENVIRONMENT
    if not path.exists():
        return {}
    sessions = storage.read_record(path, RunFolderError)["sessions"]
    return {
        "threads": list(dict.fromkeys(session["threads"] for session in sessions)),
        "device": ", ".join(dict.fromkeys(device_name(session["device"]) for session in sessions)),
    }


def device_name(name: str) -> str:
    """Return the name of a device, of a CPU with what its numbers depend on.

    That is its vector instructions, in which processors of one name can differ, and the library of float32 products in
    training unless it is MKL.
    """
    if name != "cpu":
        return name
    library = ", oneDNN" if onednn_is_faster() else ""
    return f"cpu ({torch.backends.cpu.get_cpu_capability()}{library})"


def _read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics; none if it failed before its first step."""
    return [record for _, record in read_lines(folder / METRICS)]


def _curve(metrics: Iterable[dict[str, Any]]) -> list[dict[str, float]]:
    """Return the evaluations in the metrics of a run, with the mean training loss before each."""
    curve: list[dict[str, float]] = []
    losses: list[float] = []
    for line in metrics:
        if line["split"] == "train":
            if line["loss"] is not None:  # null: the number was not finite
                losses.append(line["loss"])
            continue
        values = {name: value for name, value in line.items() if name != "split"}
        if losses:
            values["training loss"] = round(statistics.fmean(losses), 6)
        curve.append(values)
        losses = []
    return curve
