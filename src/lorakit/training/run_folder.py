"""The folder of a run: its files (`lorakit.file_names`) and its result."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch

from lorakit import storage
from lorakit.adapters import formats
from lorakit.configuration import differences, flat_settings
from lorakit.errors import RunFolderError
from lorakit.evaluation.score import Direction
from lorakit.file_names import (
    ADAPTER,
    BEST,
    CHECKPOINTS,
    CONFIG,
    ENVIRONMENT,
    EVENTS,
    METRICS,
    RESULT,
    RUN_FILES,
    RUN_FOLDERS,
    SAMPLES,
)
from lorakit.formatting import resume_command
from lorakit.training.checkpoint import State, from_fields
from lorakit.training.config import TrainConfig
from lorakit.training.distributed import Processes
from lorakit.training.environment import environment
from lorakit.training.memory import peak_memory

_LOG = logging.getLogger(__name__)

OUT_OF_MEMORY, REWIND = "out of memory", "rewind"
"""Kinds of events in events.json."""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """Result of a finished run."""

    folder: Path
    """The run folder."""
    steps: int
    """Optimizer steps of the run."""
    stopped_early: bool
    """Whether early stopping ended the run before its last step."""
    train_loss: float | None
    """Loss of the last step."""
    scores_before: dict[str, float] = field(default_factory=dict)
    """Validation scores before the first step; empty without validation data."""
    scores: dict[str, float] = field(default_factory=dict)
    """Validation scores after the last step."""
    best_step: int | None
    """Step with the best validation score; best/ has its adapter."""
    best_scores: dict[str, float] = field(default_factory=dict)
    """Validation scores at that step."""
    tokens: int
    """Tokens of the examples of all training steps, without savings by packing."""
    computed_tokens: int = 0
    """Tokens that the model computed for them: fewer with shared prefixes, more with padding."""
    seconds: float
    """Time in training steps, over all sessions."""
    processor_seconds: float = 0.0
    """Time of the processor in training steps, over all threads and sessions."""
    peak_memory: int
    """Peak memory in the run's last session, in bytes: of the GPU if the run uses one, else the resident set of the
    process. On systems that cannot reset it (macOS, Windows), the peak since the process started."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Digests of the base and of the data, by name."""

    @property
    def adapter(self) -> Path:
        """The adapter after the last step."""
        return self.folder / ADAPTER

    @property
    def best(self) -> Path | None:
        """The adapter with the best validation score; None without validation data."""
        return None if self.best_step is None else self.folder / BEST


class JsonLines:
    """An append-only file of JSON objects, one per line, each with a `step`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, **record: Any) -> None:
        """Append one line; a killed process leaves at most the last line incomplete."""
        with storage.writing(self.path):
            self._write(storage.json_line(storage.finite(record)) + "\n")

    def _write(self, line: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)

    def sync(self) -> None:
        """Flush the lines to the disk: after a power cut, those before a checkpoint must not be missing."""
        if self.path.exists():
            with storage.writing(self.path), self.path.open("ab") as file:
                os.fsync(file.fileno())

    def truncate(self, state: State) -> None:
        """Drop the lines that were recorded after `state`, and an incomplete last line.

        Raises:
            RunFolderError: Another line is damaged.
        """
        if not self.path.exists():
            return
        remaining = self.until(state)
        with storage.atomic_file(self.path) as temporary:
            temporary.write_bytes(b"".join(remaining))

    def until(self, state: State) -> list[bytes]:
        """Return the lines that were recorded until `state`; none if the file is missing.

        Raises:
            RunFolderError: A line is damaged. An incomplete last line is skipped instead.
        """
        end = (state.step, state.evaluated)  # a step is trained before it is evaluated
        return [
            line
            for line, record in read_lines(self.path)
            if (record["step"], record.get("split") != "train") <= end
        ]


def read_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Return each line of a file of JsonLines, with its record; none if the file is missing.

    Raises:
        RunFolderError: A line is damaged. An incomplete last line is skipped instead.
    """
    if not path.exists():
        return []
    with storage.reading(path, RunFolderError):
        lines = path.read_bytes().split(b"\n")
    found = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or type(record.get("step")) is not int:
                raise ValueError("expected a JSON object with a step")
        except ValueError as error:
            if number < len(lines):  # only an incomplete line has no newline
                raise RunFolderError(
                    f"{path}:{number} is damaged: {error}. Delete that line to resume or report the run."
                ) from None
        else:
            found.append((line + b"\n", record))
    return found


class RunFolder:
    """An opened run folder; see `lorakit.training.opening.open_run`."""

    def __init__(
        self, path: Path, config: TrainConfig, *, extends: str = "", dtype_reason: str = ""
    ) -> None:
        self.path = path
        self.config = config
        self.dtype_reason = dtype_reason
        """Why `auto` became the dtype of `config`; "" for a dtype that the user set."""
        self.extends = extends
        """The setting that `max_steps` of a resumed run replaces, such as "max_steps 100"; "" if it is unchanged."""
        self.metrics = JsonLines(path / METRICS)
        self.samples = JsonLines(path / SAMPLES)
        self.checkpoints = path / CHECKPOINTS
        self.adapter = path / ADAPTER
        self.best = path / BEST

    def resume_command(self, processes: Processes) -> str:
        """Return the shell command that resumes this run on these processes.

        On several machines, the command has the placeholder SAME_OPTIONS: `torchrun` does not pass its options to the
        processes. The command has the settings of this session that differ from config.yaml, such as the `output` of
        a folder that was moved, or a smaller `batch_size`.
        """
        start = ["lorakit"]
        if processes.count > 1:
            all_here = processes.here == processes.count
            options = f"--nproc-per-node {processes.here}" if all_here else "SAME_OPTIONS"
            start = ["torchrun", *options.split(), "-m", "lorakit"]
        then, now = recorded_and_present(self.path, self.config)
        changed = {name: value for name, _, value in differences(then, now)}
        return resume_command(self.path, changed, start=start)

    def begin(
        self,
        state: State,
        device: torch.device,
        sizes: Mapping[str, int],
        directions: Mapping[str, Direction],
        *,
        processes: int = 1,
    ) -> None:
        """Write config.yaml and this session of the run, and drop what was recorded after `state`.

        Delete the temporaries that a killed session left, such as half a checkpoint. If `overwrite` is set, delete the
        old run first. A finished run becomes an unfinished one.

        Raises:
            RunFolderError: A file of the run to resume is damaged, or cannot be written. Damaged files are found before
                anything changes.
        """
        for folder in filter(Path.is_dir, (self.path, self.checkpoints)):
            storage.remove_leftovers(folder)
        sessions: list[dict[str, Any]] = []
        if self.config.overwrite:
            _delete(self.path)
        else:
            if (self.path / ENVIRONMENT).exists():
                record = storage.read_record(self.path / ENVIRONMENT, RunFolderError)
                sessions = record.get("sessions", [])
            for lines in (self.metrics, self.samples):
                lines.until(state)
        # First, so that a kill leaves an unfinished run. A finished one trains again if it lost its adapter.
        (self.path / RESULT).unlink(missing_ok=True)
        if self.extends or not (self.path / CONFIG).exists():
            settings = storage.dump_yaml(_saved_settings(self.config), sort_keys=False, width=100)
            with storage.atomic_file(self.path / CONFIG) as temporary:
                temporary.write_text(settings, encoding="utf-8")
        with storage.writing(self.checkpoints):
            self.checkpoints.mkdir(exist_ok=True)
        self.return_to(state)
        session = {
            "from_step": state.step,
            **environment(device, processes),
            "sizes": dict(sizes),
            "score_directions": dict(directions),
        }
        with storage.atomic_file(self.path / ENVIRONMENT) as temporary:
            storage.write_record(temporary, {"sessions": [*sessions, session]})

    def return_to(self, state: State) -> None:
        """Drop metrics, samples and events that were recorded after `state`."""
        self.metrics.truncate(state)
        self.samples.truncate(state)
        self.write_events(state)

    def write_events(self, state: State) -> None:
        """Write what went wrong in the run so far to events.json."""
        if not state.events:
            (self.path / EVENTS).unlink(missing_ok=True)
            return
        with storage.atomic_file(self.path / EVENTS) as temporary:
            storage.write_record(temporary, {"events": state.events})

    def finish(self, state: State, device: torch.device) -> RunResult:
        """Write result.json, which marks the run as finished, and return its content."""
        result = RunResult(
            folder=self.path,
            steps=state.step,
            stopped_early=state.stopped_early,
            train_loss=state.train_loss,
            scores_before=state.scores_before,
            scores=state.scores,
            best_step=state.best_step,
            best_scores=state.best_scores,
            tokens=state.tokens,
            computed_tokens=state.computed_tokens,
            seconds=round(state.seconds, 3),
            processor_seconds=round(state.processor_seconds, 3),
            inputs={name: source["sha256"] for name, source in state.inputs.items()},
            peak_memory=peak_memory(device),
        )
        record = dataclasses.asdict(result)
        del record["folder"]  # users may move the folder
        with storage.atomic_file(self.path / RESULT) as temporary:
            storage.write_record(temporary, record)
        return result

    def result(self) -> RunResult | None:
        """Return the result of a finished run; None if it is unfinished, extended or will be overwritten."""
        path = self.path / RESULT
        if (
            self.config.overwrite
            or self.extends
            or not (path.exists() and formats.is_adapter(self.adapter))
        ):
            return None
        record = storage.read_record(path, RunFolderError)
        return from_fields(RunResult, {"folder": self.path, **record}, path)


def adapter_of_run(run: str | Path) -> Path | None:
    """Return the adapter that a run has saved: that of its last step, else the best one so far; None before both.

    A folder that holds no adapter, such as an empty adapter/, does not count.
    """
    return next(filter(formats.is_adapter, (Path(run, ADAPTER), Path(run, BEST))), None)


def set_aside(folder: Path) -> None:
    """Rename an adapter folder that has files of other programs, so that a save neither deletes them nor fails.

    Editors and notebooks write hidden files beside the model card that a user looks at.

    Raises:
        RunFolderError: It cannot be read or renamed.
    """
    others = formats.other_files(folder)
    if not others:
        return
    numbered = (folder.with_name(f"{folder.name}-kept-{number}") for number in count(1))
    kept = next(path for path in numbered if not path.exists())
    with storage.writing(folder):
        folder.rename(kept)
    _LOG.warning("Renamed '%s' to '%s', to keep %s.", folder, kept, ", ".join(others))


def _saved_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings for config.yaml: all but `resume` and `overwrite`, which apply to one session."""
    settings = config.as_dict()
    del settings["resume"], settings["overwrite"]
    return settings


def _delete(path: Path) -> None:
    """Delete the files of a run, the result first and the configuration last.

    If this is interrupted, the folder contains an unfinished run, which can be resumed or overwritten.
    """
    entries = [
        RESULT,
        *(n for n in (*RUN_FILES, *RUN_FOLDERS) if n not in (RESULT, CONFIG)),
        CONFIG,
    ]
    for name in entries:
        entry = path / name
        with storage.writing(entry):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)


def recorded_and_present(path: Path, config: TrainConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings in the run's config.yaml and those of this session, by dotted name."""
    return flat_settings(read_settings(path)), flat_settings(_saved_settings(config))


def read_settings(path: Path) -> dict[str, Any]:
    """Return the settings in a run folder's config.yaml; empty if the file does not have the settings of a run.

    Raises:
        RunFolderError: The file cannot be read, or is damaged.
    """
    settings = storage.read_yaml(path / CONFIG, RunFolderError)
    of_a_run = {"base", "data", "method", "output"}
    return settings if isinstance(settings, dict) and settings.keys() >= of_a_run else {}
