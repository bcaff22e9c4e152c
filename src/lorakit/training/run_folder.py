"""The folder of a run: its files, its lock, and its result.

=================  ===================================================================================
config.yaml        every setting, also defaults; ``--config`` with this file repeats the run
environment.json   software, processor and threads, one entry per session (a resumed run has several)
metrics.jsonl      one line per step and per evaluation
samples.jsonl      text generated at each evaluation
events.json        what went wrong and did not end the run: memory that ran out, a loss that diverged
checkpoints/       step-000100/ and so on, for ``--resume``
best/              the adapter with the best validation score
adapter/           the adapter after the last step
result.json        written last: a run with this file is finished
prediction.json    the planner's prediction, if the run was planned
report.html        the report, written by ``lorakit train`` and ``lorakit report``
=================  ===================================================================================
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, cast

import torch

from lorakit import storage
from lorakit.adapters.formats import other_files
from lorakit.configuration import differences, flat_settings
from lorakit.errors import ConfigurationError, RunFolderError
from lorakit.formatting import resume_command
from lorakit.methods.registry import default_rate
from lorakit.models.devices import pick_device
from lorakit.models.dtype_choice import resolve_dtype
from lorakit.training.checkpoint import State, from_fields, newest_step
from lorakit.training.config import TrainConfig
from lorakit.training.distributed import Processes
from lorakit.training.environment import environment
from lorakit.training.memory import peak_memory
from lorakit.training.warm_start import method_of

_LOG = logging.getLogger(__name__)

CONFIG, RESULT, ENVIRONMENT = "config.yaml", "result.json", "environment.json"
METRICS, SAMPLES, EVENTS = "metrics.jsonl", "samples.jsonl", "events.json"
OUT_OF_MEMORY, REWIND = "out of memory", "rewind"
"""Kinds of events in events.json."""
REPORT, PREDICTION = "report.html", "prediction.json"
CHECKPOINTS, BEST, ADAPTER, TENSORBOARD = "checkpoints", "best", "adapter", "tensorboard"
FILES = (CONFIG, RESULT, ENVIRONMENT, METRICS, SAMPLES, EVENTS, REPORT, PREDICTION)
FOLDERS = (CHECKPOINTS, BEST, ADAPTER, TENSORBOARD)
OF_A_RUN = {"base", "data", "method", "output"}
"""Settings of every run, which identify its config.yaml."""

NOT_COMPARED = (
    *("output", "resume", "overwrite", "loggers", "processes_timeout", "shard"),
    *("optimizer.on_divergence", "optimizer.explosion", "checkpoints"),
    *("data.test", "data.test_split"),  # for other commands, with the same file of settings
    # A run may need others to go on; only rounding differs.
    *("gradient_checkpointing", "base.device"),
)
"""Settings that may differ between the sessions of a run: they do not change the results of a run that goes well."""


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
        return [
            line
            for line, record in read_lines(self.path)
            if record["step"] < state.step
            or (
                record["step"] == state.step and (state.evaluated or record.get("split") == "train")
            )
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
    """An opened run folder; see :func:`open_run`."""

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

    def resume_command(self, processes: int = 1) -> str:
        """Return the shell command that resumes this run on as many processes.

        On several machines, SAME_OPTIONS is in place of the options of `torchrun`, which it does not tell. The command
        has the settings of this session that differ from config.yaml, such as the `output` of a folder that was
        moved, or a smaller `batch_size`.
        """
        start = ["lorakit"]
        if processes > 1:
            here = os.environ.get("LOCAL_WORLD_SIZE", str(processes))
            options = ["--nproc-per-node", here] if here == str(processes) else ["SAME_OPTIONS"]
            start = ["torchrun", *options, "-m", "lorakit"]
        then, now = _recorded_and_present(self.path, self.config)
        changed = {name: value for name, _, value in differences(then, now)}
        return resume_command(self.path, changed, start=start)

    def begin(
        self, state: State, device: torch.device, sizes: Mapping[str, int], *, processes: int = 1
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
        session = {"from_step": state.step, **environment(device, processes), "sizes": dict(sizes)}
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
        if self.config.overwrite or self.extends or not (path.exists() and self.adapter.exists()):
            return None
        record = storage.read_record(path, RunFolderError)
        return from_fields(RunResult, {"folder": self.path, **record}, path)


def set_aside(folder: Path) -> None:
    """Rename an adapter folder that has files of other programs, so that a save neither deletes them nor fails.

    Editors and notebooks write hidden files beside the model card that a user looks at.

    Raises:
        RunFolderError: It cannot be read or renamed.
    """
    others = other_files(folder)
    if not others:
        return
    numbered = (folder.with_name(f"{folder.name}-kept-{number}") for number in count(1))
    kept = next(path for path in numbered if not path.exists())
    with storage.writing(folder):
        folder.rename(kept)
    _LOG.warning("Renamed '%s' to '%s', to keep %s.", folder, kept, ", ".join(others))


@contextmanager
def open_run(config: TrainConfig, processes: Processes) -> Iterator[RunFolder]:
    """Open and lock the run folder `config.output` in the first process of a run, the only one that writes to it.

    Raises:
        RunFolderError: The folder cannot be opened; see `_open_locked`. If the disk is full in the block and the run
            has a checkpoint, the error names the command that resumes it.
        ConfigurationError: The run to resume has other settings, or the processes have different ones.
    """
    processes.require_same(flat_settings(config.as_dict()))
    with ExitStack() as stack:
        run = None
        with processes.together():
            if processes.is_first:
                run = stack.enter_context(_open_locked(config))
        run = cast(RunFolder, processes.from_first(run))
        try:
            yield run
        except RunFolderError as error:
            if not storage.is_disk_full(error) or not newest_step(run.checkpoints):
                raise
            resume = run.resume_command(processes.count)
            raise RunFolderError(
                str(error), f"The run can go on from its checkpoint: {resume}"
            ) from error


@contextmanager
def _open_locked(config: TrainConfig) -> Iterator[RunFolder]:
    """Open or create the run folder `config.output`, and lock it for this process.

    The folder does not change before `RunFolder.begin`. If a run fails before that (a misspelt target, an empty data
    file, a damaged checkpoint), it leaves an old run intact, and removes a new folder.

    Raises:
        RunFolderError: Another process writes to the folder, the folder contains other files, or it contains a run
            that `config` neither resumes nor overwrites, or would overwrite together with an input of the new run.
        ConfigurationError: The run to resume has other settings, or `torchrun` has restarted a run that overwrites.
    """
    path = Path(config.output)
    # The real path. overwrite=True accepts a folder with files; the next line checks that they are those of a run.
    target = storage.require_free_folder(path, overwrite=True)
    _require_run_or_empty(path)  # before the lock, which is a file in the folder
    if config.overwrite:
        _require_first_start(path)
        _require_inputs_elsewhere(path, config)
    config, dtype_reason = _resolved(config, path)
    new_folders = [folder for folder in (target, *target.parents) if not folder.exists()]
    try:
        with storage.lock_folder(path):
            extends = ""
            if (path / CONFIG).exists() and not config.overwrite:
                _require_resumable(path, config)
                extends = _extended_setting(path, config)
            try:
                yield RunFolder(path, config, extends=extends, dtype_reason=dtype_reason)
            finally:
                if not (path / CONFIG).exists():
                    # Before the lock is released: afterwards another run may hold this file.
                    for name in (storage.LOCK_NAME, storage.HOLDER_NAME):
                        # Windows refuses to delete the open lock file; filelock deletes it after the release.
                        with suppress(OSError):
                            (path / name).unlink()
    finally:
        if not (path / CONFIG).exists():
            for folder in new_folders:
                with suppress(OSError):  # another process has added a file
                    folder.rmdir()


def _resolved(config: TrainConfig, path: Path) -> tuple[TrainConfig, str]:
    """Return `config` with the resolved dtype and learning rate, which config.yaml records, and why this dtype.

    A resumed run keeps its dtype, also on a machine where another is faster.
    """
    base, reason = config.base, ""
    if base.dtype == "auto" and config.resume and (path / CONFIG).exists():
        recorded = read_settings(path).get("base", {}).get("dtype", "auto")
        base, reason = dataclasses.replace(base, dtype=recorded), "the run began with it"
    if base.dtype == "auto":
        pick_device(base.device)  # rejects a device that this machine lacks
        base, reason = resolve_dtype(base, batch_size=config.batch_size)
    method, rate = method_of(config), config.optimizer.learning_rate
    rate = default_rate(method) if rate is None else rate
    optimizer = dataclasses.replace(config.optimizer, learning_rate=rate)
    return dataclasses.replace(config, base=base, optimizer=optimizer), reason


def _saved_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings for config.yaml: all but `resume` and `overwrite`, which apply to one session."""
    settings = config.as_dict()
    del settings["resume"], settings["overwrite"]
    return settings


def _require_run_or_empty(path: Path) -> None:
    """Reject a folder that is not a run: a typing error in `output` must not overwrite or delete other files."""
    if not path.exists():
        return
    if (path / CONFIG).exists():
        if read_settings(path):
            return
        raise RunFolderError(
            f"{path} is not a run folder: its {CONFIG} does not have the settings of a run. Choose a new or empty "
            "folder as output."
        )
    if others := storage.visible_names(path):
        raise RunFolderError(
            f"{path} is not a run folder: it has no {CONFIG}, but contains {', '.join(others[:3])}. "
            "Choose a new or empty folder as output."
        )


def _require_first_start(path: Path) -> None:
    """Reject overwriting a run after `torchrun` has restarted its processes: it may be what they have trained."""
    if (path / CONFIG).exists() and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        raise ConfigurationError(
            f"torchrun has restarted its processes, and overwrite would delete what they have trained in {path}. Start "
            "the command with resume (--resume) instead of overwrite; if an older run is there, delete it first."
        )


def _require_inputs_elsewhere(path: Path, config: TrainConfig) -> None:
    """Reject overwriting a run that contains the adapter or the data of the new one."""
    deleted = [path / name for name in (*FILES, *FOLDERS)]
    settings = {
        "from_adapter": config.from_adapter,
        "data.train": config.data.train,
        "data.validation": config.data.validation,
    }
    for setting, value in settings.items():
        for source in [value] if isinstance(value, str) else value or []:
            if any(storage.is_within(source, entry) for entry in deleted):
                raise RunFolderError(
                    f"{path} contains an input of the run ({setting} {source}), and overwriting would delete it. "
                    "Choose another output."
                )


def _delete(path: Path) -> None:
    """Delete the files of a run, the result first and the configuration last.

    If this is interrupted, the folder contains an unfinished run, which can be resumed or overwritten.
    """
    entries = [RESULT, *(n for n in (*FILES, *FOLDERS) if n not in (RESULT, CONFIG)), CONFIG]
    for name in entries:
        entry = path / name
        with storage.writing(entry):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)


def _require_resumable(path: Path, config: TrainConfig) -> None:
    """Reject an existing run unless `config` resumes it with equal settings."""
    if not config.resume:
        state = "a finished run" if (path / RESULT).exists() else "an unfinished run"
        raise RunFolderError(
            f"{path} contains {state}. Set resume (--resume) to continue it, overwrite (--overwrite) to delete it, or "
            "choose another output."
        )
    for name in (*FILES, *FOLDERS):
        if (path / name).exists() and (path / name).is_dir() != (name in FOLDERS):
            actual, expected = ("folder", "file") if name in FILES else ("file", "folder")
            raise RunFolderError(
                f"{path / name} is a {actual}; a run has a {expected} of this name. Move it away to resume the run."
            )
    then, now = _recorded_and_present(path, config)
    # How a step is cut into batches does not change its result.
    cut = ("batch_size", "accumulation")
    same_steps = math.prod(then.get(key, 0) for key in cut) == math.prod(now[key] for key in cut)
    changed = differences(then, now)
    allowed = {
        key: after
        for key, _, after in changed
        if {key, key.split(".")[0]}.intersection(NOT_COMPARED)
        or (key == "max_steps" and config.max_steps)
        or (key in cut and same_steps)
    }
    refused = [
        f"{key} was {before!r} and is {after!r}"
        for key, before, after in changed
        if key not in allowed
    ]
    if refused:
        raise ConfigurationError(
            f"The run in {path} has other settings: {'; '.join(refused)}. Resume it with its own settings "
            f"({resume_command(path, allowed)}; a higher --max_steps makes it longer), or start a new run "
            "from its weights with from_adapter."
        )


def _recorded_and_present(path: Path, config: TrainConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings in the run's config.yaml and those of this session, by dotted name."""
    return flat_settings(read_settings(path)), flat_settings(_saved_settings(config))


def _extended_setting(path: Path, config: TrainConfig) -> str:
    """Return the setting that `max_steps` replaces to make a run longer, or "" if it is unchanged.

    Raises:
        ConfigurationError: `max_steps` is lower than before, or the run has already ended by early stopping or reached
            that step.
        RunFolderError: The run is finished and has no checkpoint.
    """
    settings = read_settings(path)
    then, now = settings.get("max_steps"), config.max_steps
    if now is None or now == then:
        return ""
    before = f"epochs {settings.get('epochs')}" if then is None else f"max_steps {then}"
    done = newest_step(path / CHECKPOINTS)
    if now < max(then or 0, done):
        raise ConfigurationError(
            f"max_steps is {now}, but the run in {path} has {before} and a checkpoint at step {done}. A resumed run "
            "can only have more steps: raise max_steps, or start a new run."
        )
    if not (path / RESULT).exists():
        return before
    if not done:
        raise RunFolderError(
            f"The run in {path} is finished, but has no checkpoint to continue from, so max_steps {now} would train it "
            "again from its first step. Start a new run from its weights with from_adapter."
        )
    if storage.read_record(path / RESULT, RunFolderError).get("stopped_early"):
        raise ConfigurationError(
            f"The run in {path} was stopped early (evaluation.patience), so more steps do not continue it. Start a new "
            "run from its weights with from_adapter."
        )
    return before


def read_settings(path: Path) -> dict[str, Any]:
    """Return the settings in a run folder's config.yaml; empty if the file does not have the settings of a run.

    Raises:
        RunFolderError: The file cannot be read, or is damaged.
    """
    settings = storage.read_yaml(path / CONFIG, RunFolderError)
    return settings if isinstance(settings, dict) and settings.keys() >= OF_A_RUN else {}
