"""Checkpoints: the complete state of a run, so that a resumed run ends with the same weights.

A checkpoint is a folder ``step-000100`` of

- ``weights.safetensors``: the trained tensors, in the dtype in which they are trained;
- ``optimizer.safetensors``: AdamW's two running means and step count of each trained tensor;
- ``state.json``: the fields of `State`, the digests of the other files, and its own checksum.

The step number is the position in the data (see schedule.py), and each batch seeds its random numbers (see noise.py).

A checkpoint folder is written under a temporary name and renamed when it is complete. Disks fail, so a resumed run
verifies the digests of the newest checkpoint. It skips a damaged checkpoint and uses the one before: every checkpoint
of a run leads to the same weights.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lorakit import storage
from lorakit.errors import RunFolderError
from lorakit.file_names import OPTIMIZER, STATE, WEIGHTS
from lorakit.models.config_fields import VERSION, changed_fields
from lorakit.models.sharding import shard_like
from lorakit.storage.tensors import read_safetensors, write_safetensors

_LOG = logging.getLogger(__name__)

TENSOR_FILES = (WEIGHTS, OPTIMIZER)
NAME = re.compile(r"step-(\d{6,})")

KEPT_LOSSES = 60
"""Number of losses in a checkpoint: 50 for the usual loss and 10 that may have exploded."""

Inputs = dict[str, dict[str, str]]
"""Source and SHA-256 of the base model and of each data split that a run reads; of settings also `fields`, their values
as JSON."""

T = TypeVar("T")


@dataclass(kw_only=True)
class State:
    """Progress of a run: the counters and scores that a checkpoint stores."""

    step: int = 0
    """Finished optimizer steps."""
    evaluated: bool = False
    """Whether every evaluation that is due is done: the one before the first step, or after the latest one."""
    tokens: int = 0
    """Tokens of all examples so far, without savings by packing."""
    computed_tokens: int = 0
    """Tokens that the model computed for them: fewer with shared prefixes, more with padding."""
    seconds: float = 0.0
    """Time in steps, over all sessions."""
    processor_seconds: float = 0.0
    """Time of the processor in steps, over all threads and sessions. It does not count waiting for other programs. Of
    several processes of a run, it is that of the first."""
    train_loss: float | None = None
    """Loss of the last step."""
    scores_before: dict[str, float] = field(default_factory=dict)
    """Validation scores before the first step."""
    scores: dict[str, float] = field(default_factory=dict)
    """The latest validation scores."""
    best_step: int | None = None
    """Step of the best validation score so far."""
    best_scores: dict[str, float] = field(default_factory=dict)
    """Validation scores at that step."""
    without_best: int = 0
    """Evaluations since the best one."""
    stopped_early: bool = False
    """Whether early stopping ended the run before its last step."""
    losses: list[float] = field(default_factory=list)
    """Losses of the last `KEPT_LOSSES` steps."""
    usual_loss: float = 0.0
    """The highest median of losses so far, with which an exploding loss is compared."""
    rewinds: int = 0
    """How often the run went back to a checkpoint after it had diverged."""
    batch_sizes: list[list[int]] = field(default_factory=list)
    """For each process the examples that it computes at a time, in training and in evaluations. Fewer than configured
    after it has run out of memory."""
    events: list[dict[str, Any]] = field(default_factory=list)
    """What went wrong in the run and did not end it, for its report."""
    inputs: Inputs = field(default_factory=dict)
    """Base and data at the start of the run; a resumed run must have the same ones."""

    @property
    def is_best(self) -> bool:
        """Whether the latest step has the best validation score so far."""
        # After a divergence the run passes the best step again, with other weights.
        return self.evaluated and self.best_step == self.step and self.without_best == 0

    def advance(
        self,
        loss: float,
        *,
        tokens: int,
        computed_tokens: int,
        seconds: float,
        processor_seconds: float,
    ) -> None:
        """Count a finished step."""
        self.step += 1
        self.train_loss = loss
        self.losses = [*self.losses, loss][-KEPT_LOSSES:]
        self.tokens += tokens
        self.computed_tokens += computed_tokens
        self.seconds += seconds
        self.processor_seconds += processor_seconds


def save(
    folder: Path,
    state: State,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    *,
    keep: int,
    old: int | None = None,
) -> None:
    """Write a checkpoint into `folder`, then delete all but it and the `keep` - 1 before it.

    `weights` and `optimizer` (from `optimizer_tensors`) are not sharded. `old` is a step to rewind to: the newest
    checkpoint at or before it is kept too, and the next one, which will replace that one as `old` grows.

    Checkpoints of later steps are deleted: they are damaged, or the run would have resumed from one of them. If one
    cannot be deleted, a warning is logged, and the next call tries again.
    """
    path = folder / f"step-{state.step:06d}"
    with storage.atomic_folder(path, overwrite=True) as temporary:
        write_safetensors(temporary / WEIGHTS, weights)
        write_safetensors(temporary / OPTIMIZER, optimizer)
        digests = {name: storage.sha256(temporary / name) for name in TENSOR_FILES}
        storage.write_record(
            temporary / STATE, {"state": dataclasses.asdict(state), "files": digests}
        )
    # From failed deletions below; nothing else writes to a run's folder.
    for rest in folder.glob(".step-*"):
        shutil.rmtree(rest, ignore_errors=True)
    checkpoints = checkpoints_in(folder)
    usable = [path for path in checkpoints if step_of(path) <= state.step]
    kept = usable[-keep:]
    if old is not None:
        first = max(sum(step_of(path) <= old for path in usable) - 1, 0)
        kept += usable[first : first + 2]
    failures = []
    for path in checkpoints:
        if path not in kept:
            try:
                storage.delete_folder(path)
            except OSError as error:  # of a file that another program has open, on NFS and Windows
                failures.append(f"'{path}' ({error.strerror or error})")
    if failures:
        _LOG.warning(
            "Cannot delete old checkpoints: %s. Each later checkpoint of the run tries again.",
            ", ".join(failures),
        )


def restore(
    folder: Path,
    weights: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    inputs: Inputs,
) -> State:
    """Copy the newest undamaged checkpoint of `folder` into `weights` and `optimizer`, and return its state.

    Raises:
        RunFolderError: There is no checkpoint, all are damaged, or the newest has other tensors or other `inputs`.
    """
    checkpoints = checkpoints_in(folder)
    if not checkpoints:
        # The adapter was prepared for a checkpoint, so it cannot train from its start.
        raise RunFolderError(
            f"'{folder}' had a checkpoint when this command started, and has none now. Start the command again."
        )
    path, state = newest_whole(checkpoints)
    _require_same(inputs, state.inputs, path)
    stored = read_safetensors(path / WEIGHTS, RunFolderError, mapped=True)
    if differing := stored.keys() ^ weights.keys():
        raise RunFolderError(
            f"{path} does not fit this run: {len(differing)} tensors are only in the checkpoint or only in the "
            f"model, for example {sorted(differing)[0]}. Resume with the software that began the run, or start a new "
            "run with from_adapter."
        )
    with torch.no_grad():
        for name, tensor in weights.items():
            tensor.copy_(shard_like(stored[name], tensor))
    _restore_optimizer(optimizer, read_safetensors(path / OPTIMIZER, RunFolderError, mapped=True))
    return state


def newest_whole(checkpoints: list[Path]) -> tuple[Path, State]:
    """Return the newest undamaged one of `checkpoints` (oldest first), and its state.

    Raises:
        RunFolderError: All are damaged, or another version of lorakit wrote it.
    """
    damages: list[str] = []
    for path in reversed(checkpoints):
        try:
            record = _verified_record(path)
        except RunFolderError as error:
            damages.append(str(error))
            continue
        if others := sorted(record["files"].keys() - set(TENSOR_FILES)):
            raise _of_another_version(path / STATE, f"it lists {', '.join(others)}")
        state = from_fields(State, record["state"], path / STATE)
        if damages:
            _LOG.warning("%s The run resumes from step %d.", " ".join(damages), state.step)
        return path, state
    raise RunFolderError(
        f"No checkpoint in {checkpoints[0].parent} is undamaged, so the run cannot resume. Restore one from a copy, "
        f"or start a new run with overwrite (--overwrite). {' '.join(damages)}"
    )


def _verified_record(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's state.json after verifying the digest of every file."""
    record = storage.read_record(path / STATE, RunFolderError)
    if record.keys() != {"state", "files"} or not record["files"].keys() >= set(TENSOR_FILES):
        raise RunFolderError(f"'{path / STATE}' is not the record of a checkpoint.")
    for name in TENSOR_FILES:
        with storage.reading(path / name, RunFolderError):
            digest = storage.sha256(path / name)
        if digest != record["files"][name]:
            raise RunFolderError(
                f"'{path / name}' is damaged: its SHA-256 differs from the one in {STATE}."
            )
    return record


def from_fields(kind: type[T], fields: Mapping[str, Any], path: Path) -> T:
    """Return a `kind` with the fields that were read from `path`.

    Raises:
        RunFolderError: `kind` has other fields in this version of lorakit.
    """
    try:
        return kind(**fields)
    except TypeError as error:
        raise _of_another_version(path, str(error)) from None


def _of_another_version(path: Path, reason: str) -> RunFolderError:
    return RunFolderError(
        f"{path} comes from another version of lorakit ({reason}). Resume with that version, or start a new run with "
        "from_adapter."
    )


def fields_input(source: str, fields: Mapping[str, Any] | None) -> dict[str, str]:
    """Return the entry of `Inputs` for the fields of a configuration, so that an error can name those that changed."""
    values = {name: value for name, value in (fields or {}).items() if name != VERSION}
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return {"source": source, "sha256": digest, "fields": json.dumps(fields, sort_keys=True)}


def _require_same(now: Inputs, then: Inputs, path: Path) -> None:
    none = {"source": "none", "sha256": "none"}
    for name, before in then.items():
        after = now.get(name, none)
        if "fields" in before and "fields" in after:
            if changed := changed_fields(json.loads(before["fields"]), json.loads(after["fields"])):
                raise RunFolderError(
                    f"The {name} of '{after['source']}' has changed since {path} was written: {', '.join(changed)}. "
                    "Restore it, or start a new run with from_adapter."
                )
        elif before["sha256"] != after["sha256"]:
            raise RunFolderError(
                f"The {name} has changed since {path} was written: it was '{before['source']}' with SHA-256 "
                f"{before['sha256'][:12]} and is '{after['source']}' with {after['sha256'][:12]}. Restore it, or start "
                "a new run with from_adapter."
            )


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints of `folder`, oldest first; none if it is missing."""
    if not folder.is_dir():
        return []
    paths = [path for path in folder.iterdir() if NAME.fullmatch(path.name)]
    return sorted(paths, key=step_of)


def step_of(path: Path) -> int:
    """Return the step of a checkpoint."""
    return int(path.name.removeprefix("step-"))


def delete_after(folder: Path, step: int) -> bool:
    """Delete the checkpoints after `step`, unless there is no other; return whether there is one.

    Raises:
        RunFolderError: All others are damaged, or one cannot be deleted.
    """
    checkpoints = checkpoints_in(folder)
    later = [path for path in checkpoints if step_of(path) > step]
    if len(later) == len(checkpoints):
        return False
    newest_whole([path for path in checkpoints if path not in later])  # before one is deleted
    for path in reversed(later):
        with storage.writing(path):
            storage.delete_folder(path)
    return True


def newest_step(folder: Path) -> int:
    """Return the step of the newest checkpoint of `folder`; 0 if it has none."""
    checkpoints = checkpoints_in(folder)
    return step_of(checkpoints[-1]) if checkpoints else 0


def _named_parameters(optimizer: torch.optim.Optimizer) -> list[tuple[str, nn.Parameter]]:
    return [
        pair
        for group in optimizer.param_groups
        for pair in zip(group["names"], group["params"], strict=True)
    ]


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the state of each trained tensor, by names such as ``layer.weight/exp_avg``."""
    return {
        f"{name}/{key}": value
        for name, parameter in _named_parameters(optimizer)
        for key, value in optimizer.state[parameter].items()
    }


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    by_name: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parameter, key = name.rsplit("/", 1)
        by_name.setdefault(parameter, {})[key] = tensor
    for name, parameter in _named_parameters(optimizer):
        optimizer.state[parameter] = {
            key: shard_like(tensor, parameter if tensor.ndim else tensor).to(parameter.device)
            for key, tensor in by_name.get(name, {}).items()
        }
