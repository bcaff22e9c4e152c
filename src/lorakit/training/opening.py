"""Open the folder of a run: lock it, and reject settings that would damage or mix up the run in it."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import cast

from lorakit import storage
from lorakit.configuration import differences, flat_settings
from lorakit.errors import ConfigurationError, RunFolderError
from lorakit.file_names import CHECKPOINTS, CONFIG, RESULT, RUN_FILES, RUN_FOLDERS
from lorakit.formatting import resume_command
from lorakit.methods.registry import default_rate
from lorakit.models.devices import pick_device
from lorakit.models.dtype_choice import resolve_dtype
from lorakit.training.checkpoint import newest_step
from lorakit.training.config import TrainConfig
from lorakit.training.distributed import Processes
from lorakit.training.environment import versions
from lorakit.training.run_folder import RunFolder, read_settings, recorded_and_present
from lorakit.training.warm_start import method_of

ROUNDING = ("gradient_checkpointing", "evaluation.batch_size")
"""Settings that round differently. A run that is out of memory may need other values to go on."""

NOT_COMPARED = (
    *("output", "resume", "overwrite", "loggers", "processes_timeout", "shard"),
    *("optimizer.on_divergence", "optimizer.explosion", "checkpoints"),
    *("data.test", "data.test_split"),  # for other commands, with the same file of settings
    *("base.device", *ROUNDING),
)
"""Settings that may differ between the sessions of a run: only the last three change its results, by rounding."""


@contextmanager
def open_run(config: TrainConfig, processes: Processes) -> Iterator[RunFolder]:
    """Open and lock the run folder `config.output` in the first process of a run, the only one that writes to it.

    Raises:
        RunFolderError: Another process writes to the folder, the folder contains other files, or it contains a run
            that `config` neither resumes nor overwrites, or would overwrite together with an input of the new run. If
            the disk is full in the block and the run has a checkpoint, the error names the command that resumes it.
        ConfigurationError: The run to resume has other settings, the processes have different settings or software, or
            `torchrun` has restarted a run that overwrites.
    """
    software = {k: v for k, v in versions().items() if k in ("lorakit", "torch", "transformers")}
    # Not the build, such as +cu128, which another kind of machine needs.
    processes.require_same({k: v and v.partition("+")[0] for k, v in software.items()})
    processes.require_same(flat_settings(config.as_dict()))
    with ExitStack() as stack:
        run = None
        with processes.together():
            if processes.is_first:
                run = stack.enter_context(_open_locked(config, processes.here))
        run = cast(RunFolder, processes.from_first(run))
        try:
            yield run
        except RunFolderError as error:
            if not storage.is_disk_full(error) or not newest_step(run.checkpoints):
                raise
            resume = run.resume_command(processes)
            raise RunFolderError(
                str(error), f"The run can go on from its checkpoint: {resume}"
            ) from error


@contextmanager
def _open_locked(config: TrainConfig, copies: int) -> Iterator[RunFolder]:
    """Open or create the run folder `config.output`, and lock it for this process.

    The folder does not change before `RunFolder.begin`. If a run fails before that (a misspelt target, an empty data
    file, a damaged checkpoint), it leaves an old run intact, and removes a new folder.
    """
    path = Path(config.output)
    # The real path. overwrite=True accepts a folder with files; the next line checks that they are those of a run.
    target = storage.require_free_folder(path, overwrite=True)
    _require_run_or_empty(path)  # before the lock, which is a file in the folder
    if config.overwrite:
        _require_first_start(path)
        _require_inputs_elsewhere(path, config)
    config, dtype_reason = _resolved(config, path, copies)
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
                    # Windows refuses to delete the open lock file; filelock deletes it after the release.
                    with suppress(OSError):
                        (path / storage.LOCK_NAME).unlink()
    finally:
        if not (path / CONFIG).exists():
            for folder in new_folders:
                with suppress(OSError):  # another process has added a file
                    folder.rmdir()


def _resolved(config: TrainConfig, path: Path, copies: int) -> tuple[TrainConfig, str]:
    """Return `config` with the resolved dtype and learning rate, which config.yaml records, and why this dtype.

    A resumed run keeps its dtype, also on a machine where another is faster.
    """
    base, reason = config.base, ""
    if base.dtype == "auto" and config.resume and (path / CONFIG).exists():
        recorded = read_settings(path).get("base", {}).get("dtype", "auto")
        base, reason = dataclasses.replace(base, dtype=recorded), "the run began with it"
    if base.dtype == "auto":
        pick_device(base.device)  # rejects a device that this machine lacks
        base, reason = resolve_dtype(base, batch_size=config.batch_size, copies=copies)
    method, rate = method_of(config), config.optimizer.learning_rate
    rate = default_rate(method) if rate is None else rate
    optimizer = dataclasses.replace(config.optimizer, learning_rate=rate)
    return dataclasses.replace(config, base=base, optimizer=optimizer), reason


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
    deleted = [path / name for name in (*RUN_FILES, *RUN_FOLDERS)]
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


def _require_resumable(path: Path, config: TrainConfig) -> None:
    """Reject an existing run unless `config` resumes it with equal settings."""
    if not config.resume:
        state = "a finished run" if (path / RESULT).exists() else "an unfinished run"
        raise RunFolderError(
            f"{path} contains {state}. Set resume (--resume) to continue it, overwrite (--overwrite) to delete it, or "
            "choose another output."
        )
    for name in (*RUN_FILES, *RUN_FOLDERS):
        if (path / name).exists() and (path / name).is_dir() != (name in RUN_FOLDERS):
            actual, expected = ("folder", "file") if name in RUN_FILES else ("file", "folder")
            raise RunFolderError(
                f"{path / name} is a {actual}; a run has a {expected} of this name. Move it away to resume the run."
            )
    then, now = recorded_and_present(path, config)
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


def _extended_setting(path: Path, config: TrainConfig) -> str:
    """Return the setting that `max_steps` replaces to make a run longer, or "" if it is unchanged."""
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
