"""The folder of a run: what is in it, who may write to it, and what was resolved to get there.

=================  ===================================================================================
config.yaml        every setting, also those left at their default; ``--config`` of it repeats the run
environment.json   software, processor and threads, one entry per session (a resumed run has several)
metrics.jsonl      one line per step and per evaluation
samples.jsonl      text generated at each evaluation
checkpoints/       step-000100/ and so on, from which ``--resume true`` goes on
best/              the adapter with the best validation score
adapter/           the adapter after the last step
result.json        written last: its presence means that the run is finished
prediction.json    what was expected of the run before it began, where that is known
report.html        the run to look at, written after it by ``lorakit train`` and ``lorakit report``
=================  ===================================================================================
"""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from lorakit import storage
from lorakit.errors import ConfigurationError, RunFolderError
from lorakit.models.devices import pick_device
from lorakit.models.dtypes import resolved_dtype
from lorakit.training.checkpoint import State, from_fields
from lorakit.training.config import TrainConfig
from lorakit.training.environment import environment
from lorakit.training.memory import peak_memory

CONFIG, RESULT, ENVIRONMENT = "config.yaml", "result.json", "environment.json"
METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
REPORT, PREDICTION = "report.html", "prediction.json"
CHECKPOINTS, BEST, ADAPTER, TENSORBOARD = "checkpoints", "best", "adapter", "tensorboard"
FILES = (CONFIG, RESULT, ENVIRONMENT, METRICS, SAMPLES, REPORT, PREDICTION)
FOLDERS = (CHECKPOINTS, BEST, ADAPTER, TENSORBOARD)
OF_A_RUN = {"base", "data", "method", "output"}
"""Settings that every run has, by which its config.yaml is told from another."""

# What two sessions of one run may differ in: how the run is started, not what it computes.
NOT_COMPARED = ("output", "resume", "overwrite", "loggers")


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a finished run has to show."""

    folder: Path
    """The run folder."""
    steps: int
    """Optimizer steps made."""
    stopped_early: bool
    """Whether early stopping ended the run."""
    train_loss: float | None
    """Loss of the last step."""
    scores_before: dict[str, float] = field(default_factory=dict)
    """Validation scores before the first step; empty without validation data."""
    scores: dict[str, float] = field(default_factory=dict)
    """Validation scores after the last step."""
    best_step: int | None
    """Step with the best validation score, whose adapter is in best/."""
    best_scores: dict[str, float] = field(default_factory=dict)
    """Validation scores at that step."""
    tokens: int
    """Tokens of the examples of all training steps, each example's counted in full."""
    computed_tokens: int = 0
    """Tokens pushed through the model for them: fewer where prefixes are shared, more with padding."""
    seconds: float
    """Time spent in training steps, over all sessions."""
    peak_memory: int
    """Largest resident memory of the process in bytes in the run's last session (of the GPU's, where there is one).
    Where the system cannot start counting anew (macOS, Windows), that of the process since its start."""

    @property
    def adapter(self) -> Path:
        """The adapter after the last step."""
        return self.folder / ADAPTER

    @property
    def best(self) -> Path | None:
        """The adapter with the best validation score; None without validation data."""
        return None if self.best_step is None else self.folder / BEST


class JsonLines:
    """A growing file of JSON objects, one per line, each with a `step`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, **record: Any) -> None:
        """Write one line; a killed process leaves at most the last one incomplete."""
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        with storage.writing(self.path):
            self._write(json.dumps(finite, ensure_ascii=False) + "\n")

    def _write(self, line: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)

    def truncate(self, step: int) -> None:
        """Drop the lines of later steps, and a last line that was cut off.

        Raises:
            RunFolderError: Another line is damaged.
        """
        if not self.path.exists():
            return
        with storage.reading(self.path, RunFolderError):
            *lines, last = self.path.read_bytes().split(b"\n")
        # Every line is written with its end: what a killed process left of one has none.
        with suppress(ValueError):
            lines += [last] if last and _step_of(last) <= step else []
        kept = [
            line for number, line in enumerate(lines, 1) if self._checked_step(line, number) <= step
        ]
        with storage.atomic_file(self.path) as temporary:
            temporary.write_bytes(b"".join(line + b"\n" for line in kept))

    def _checked_step(self, line: bytes, number: int) -> int:
        try:
            return _step_of(line)
        except ValueError as error:
            raise RunFolderError(
                f"{self.path}:{number} is damaged: {error}. Delete that line to go on with the run."
            ) from None


def _step_of(line: bytes) -> int:
    """The step of a line of JsonLines; ValueError where it is none."""
    record = json.loads(line)
    step = record.get("step") if isinstance(record, dict) else None
    if type(step) is not int:
        raise ValueError("it is no object with a step")
    return step


class RunFolder:
    """An opened run folder; see :func:`open_run`."""

    def __init__(self, path: Path, config: TrainConfig) -> None:
        self.path = path
        self.config = config
        self.metrics = JsonLines(path / METRICS)
        self.samples = JsonLines(path / SAMPLES)

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / CHECKPOINTS

    @property
    def adapter(self) -> Path:
        """Where the adapter goes after the last step."""
        return self.path / ADAPTER

    @property
    def best(self) -> Path:
        """Where the adapter with the best validation score goes."""
        return self.path / BEST

    @property
    def resume_command(self) -> str:
        """The command that goes on with this run."""
        return shlex.join(
            ["lorakit", "train", "--config", str(self.path / CONFIG), "--resume", "true"]
        )

    def claim(self) -> None:
        """Make the folder that of this run: until now nothing in it was changed, an old run included."""
        if self.config.overwrite:
            _delete(self.path)
        if not (self.path / CONFIG).exists():
            settings = yaml.safe_dump(
                _startable(self.config), sort_keys=False, allow_unicode=True, width=100
            )
            with storage.atomic_file(self.path / CONFIG) as temporary:
                temporary.write_text(settings, encoding="utf-8")
        with storage.writing(self.checkpoints):
            self.checkpoints.mkdir(exist_ok=True)

    def begin(self, state: State, device: torch.device, sizes: Mapping[str, int]) -> None:
        """Note this session in environment.json, and forget what was recorded after `state`."""
        step = state.step if state.started else -1
        self.metrics.truncate(step)
        self.samples.truncate(step)
        path = self.path / ENVIRONMENT
        record = storage.read_record(path, RunFolderError) if path.exists() else {}
        session = {"from_step": state.step, **environment(device), "sizes": dict(sizes)}
        with storage.atomic_file(path) as temporary:
            storage.write_record(temporary, {"sessions": [*record.get("sessions", []), session]})

    def finish(self, state: State, device: torch.device) -> RunResult:
        """Write result.json, which marks the run as finished, and return what it says."""
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
            peak_memory=peak_memory(device),
        )
        record = dataclasses.asdict(result)
        del record["folder"]  # the folder may be moved
        with storage.atomic_file(self.path / RESULT) as temporary:
            storage.write_record(temporary, record)
        return result

    def result(self) -> RunResult | None:
        """Return the result of a finished run that is to be kept, else None."""
        path = self.path / RESULT
        if self.config.overwrite or not (path.exists() and self.adapter.exists()):
            return None
        record = storage.read_record(path, RunFolderError)
        return from_fields(RunResult, {"folder": self.path, **record}, path)


@contextmanager
def open_run(config: TrainConfig) -> Iterator[RunFolder]:
    """Open (or make) the run folder `config.output` for this process alone.

    Nothing in it changes before `RunFolder.claim`: a run that fails at once (a misspelt target, an empty data
    file) leaves an old run whole, and no folder where there was none.

    Raises:
        RunFolderError: Another run writes to it, it holds other files, or it holds a run that `config` neither
            resumes nor overwrites.
        ConfigurationError: The run to resume was configured otherwise.
    """
    path = Path(config.output)
    target = storage.require_free_folder(path, overwrite=True)
    _require_own(path)  # before the lock, which is a file in it
    config = _resolved(config)
    new = [folder for folder in (target, *target.parents) if not folder.exists()]
    try:
        with storage.lock_folder(path):
            if (path / CONFIG).exists() and not config.overwrite:
                _require_resumable(path, config)
            try:
                yield RunFolder(path, config)
            finally:
                if not (path / CONFIG).exists():
                    # Inside the lock: once it is released, another run may hold this very file.
                    for name in (storage.LOCK_NAME, storage.HOLDER_NAME):
                        (path / name).unlink(missing_ok=True)
    finally:
        if not (path / CONFIG).exists():
            for folder in new:
                with suppress(OSError):  # something else has moved in
                    folder.rmdir()


def _resolved(config: TrainConfig) -> TrainConfig:
    """Replace what depends on the machine or the method by what it is, so that config.yaml says it."""
    dtype = resolved_dtype(config.base.dtype, pick_device(config.base.device))
    return dataclasses.replace(
        config,
        base=dataclasses.replace(config.base, dtype=dtype),  # type: ignore[arg-type]
        optimizer=dataclasses.replace(config.optimizer, learning_rate=config.peak_rate),
    )


def _startable(config: TrainConfig) -> dict[str, Any]:
    """Return the settings without the two that say how this session was started."""
    settings = config.as_dict()
    del settings["resume"], settings["overwrite"]
    return settings


def _require_own(path: Path) -> None:
    """Refuse a folder of other things: a typing error in `output` must neither mix with them nor delete them."""
    if not path.exists():
        return
    if (path / CONFIG).exists():
        if read_settings(path):
            return
        raise RunFolderError(
            f"{path} is not a run folder: its {CONFIG} is not that of a run. Choose a new or empty folder as output."
        )
    others = [entry.name for entry in path.iterdir() if entry.name[0] != "."]
    if others:
        raise RunFolderError(
            f"{path} is not a run folder: it has no {CONFIG}, but {', '.join(sorted(others)[:3])}. "
            "Choose a new or empty folder as output."
        )


def _delete(path: Path) -> None:
    # The result goes first and the configuration last: whatever is left when this is interrupted is an
    # unfinished run of this folder, to be resumed or overwritten.
    entries = [RESULT, *(n for n in (*FILES, *FOLDERS) if n not in (RESULT, CONFIG)), CONFIG]
    for name in entries:
        entry = path / name
        with storage.writing(entry):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)


def _require_resumable(path: Path, config: TrainConfig) -> None:
    if not config.resume:
        state = "a finished run" if (path / RESULT).exists() else "an unfinished run"
        raise RunFolderError(
            f"{path} holds {state}. Set resume to go on with it, overwrite to delete it, or choose another output."
        )
    for name in (*FILES, *FOLDERS):
        if (path / name).exists() and (path / name).is_dir() != (name in FOLDERS):
            found, expected = ("folder", "file") if name in FILES else ("file", "folder")
            raise RunFolderError(
                f"{path / name} is a {found}, where a run has a {expected}. Move it away to go on with the run."
            )
    then, now = _flat(read_settings(path)), _flat(_startable(config))
    differences = [
        f"{key} was {then.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(then.keys() | now.keys())
        if key.split(".")[0] not in NOT_COMPARED and then.get(key) != now.get(key)
    ]
    if differences:
        raise ConfigurationError(
            f"The run in {path} was started with other settings: {'; '.join(differences)}. Resume it with its own "
            f"(--config {shlex.quote(str(path / CONFIG))} --resume true), or start a new run from its weights with "
            "from_adapter."
        )


def read_settings(path: Path) -> dict[str, Any]:
    """Return the settings that a run folder records; empty where its file is not that of a run.

    Raises:
        RunFolderError: The file cannot be read, or is damaged.
    """
    with storage.reading(path / CONFIG, RunFolderError):
        text = (path / CONFIG).read_text(encoding="utf-8")
    try:
        found = yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise RunFolderError(
            f"'{path / CONFIG}' is damaged: {' '.join(str(error).split())}. Restore it, or choose another folder."
        ) from None
    return found if isinstance(found, dict) and found.keys() >= OF_A_RUN else {}


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
