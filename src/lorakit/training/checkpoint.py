"""Checkpoints: all that a run needs to go on as if it had not been interrupted.

A checkpoint is a folder ``step-000100`` of

- ``weights.safetensors``: the trained tensors, in the precision they are trained in;
- ``optimizer.safetensors``: AdamW's two means and step count of each;
- ``random.safetensors``: the states of the random generators that dropout draws from;
- ``state.json``: the counters below, the digests of the other files, and a checksum of its own.

The position in the data is the step number itself (see schedule.py). A folder appears under its name only when it is
complete, so the newest one is always whole; it is checked against its digests nevertheless, since disks fail. One that
is damaged is passed over for the one before it: from every checkpoint of a run the same weights are reached.
"""

from __future__ import annotations

import dataclasses
import logging
import random
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from lorakit import storage
from lorakit.data.batches import token_count
from lorakit.errors import LorakitError, RunFolderError
from lorakit.storage.tensors import read_safetensors, write_safetensors

_LOG = logging.getLogger(__name__)

WEIGHTS, OPTIMIZER, RANDOM, STATE = (
    "weights.safetensors",
    "optimizer.safetensors",
    "random.safetensors",
    "state.json",
)
TENSOR_FILES = (WEIGHTS, OPTIMIZER, RANDOM)
NAME = re.compile(r"step-(\d{6,})")

Inputs = dict[str, dict[str, str]]
"""What a run reads (its base model, its data by split): the source and the SHA-256 of each."""

T = TypeVar("T")


@dataclass(kw_only=True)
class State:
    """How far a run has come."""

    step: int = 0
    """Finished optimizer steps."""
    started: bool = False
    """Whether the evaluation before the first step is done."""
    tokens: int = 0
    """Tokens of the examples so far, each example's counted in full."""
    computed_tokens: int = 0
    """Tokens pushed through the model for them: fewer where prefixes are shared, more with padding."""
    seconds: float = 0.0
    """Time spent in steps, over all sessions."""
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
    """Evaluations since then."""
    stopped_early: bool = False
    """Whether early stopping has ended the run."""
    inputs: Inputs = field(default_factory=dict)
    """What the run began with: it must not go on with another base or other data."""

    def advance(self, loss: float, batches: Iterable[Mapping[str, Tensor]], seconds: float) -> None:
        """Count a finished step."""
        self.step += 1
        self.train_loss = loss
        for batch in batches:
            self.tokens += token_count(batch)
            self.computed_tokens += batch["input_ids"].numel()
        self.seconds += seconds


def save(
    folder: Path,
    state: State,
    weights: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    keep: int,
) -> None:
    """Write the checkpoint of `state` into `folder`, then delete all but the newest `keep`.

    Raises:
        LorakitError: A weight is not a finite number: such a checkpoint must not replace a good one.
    """
    for name, weight in weights.items():
        if weight.is_floating_point() and not weight.isfinite().all():
            raise LorakitError(
                f"Training diverged: after step {state.step} {name} holds values that are not finite. Lower "
                "optimizer.learning_rate, and resume from the last checkpoint or start anew."
            )
    path = folder / f"step-{state.step:06d}"
    with storage.atomic_folder(path, overwrite=True) as temporary:
        write_safetensors(temporary / WEIGHTS, weights)
        write_safetensors(temporary / OPTIMIZER, _optimizer_tensors(optimizer))
        write_safetensors(temporary / RANDOM, _random_states())
        digests = {name: storage.sha256(temporary / name) for name in TENSOR_FILES}
        storage.write_record(
            temporary / STATE, {"state": dataclasses.asdict(state), "files": digests}
        )
    for old in _existing(folder)[:-keep]:
        shutil.rmtree(old)


def restore(
    folder: Path,
    weights: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    inputs: Inputs,
) -> State:
    """Put the newest whole checkpoint of `folder` into `weights`, `optimizer` and the random generators.

    Returns its state; that of a run which has not begun where there is no checkpoint.

    Raises:
        RunFolderError: Every checkpoint is damaged, or the newest is that of other tensors or other `inputs`.
    """
    existing = _existing(folder)
    if not existing:
        return State(inputs=inputs)
    path, state = newest_whole(existing)
    _require_same(inputs, state.inputs, path)
    stored = read_safetensors(path / WEIGHTS, RunFolderError)
    if differing := stored.keys() ^ weights.keys():
        raise RunFolderError(
            f"{path} does not fit this run: only one of the two has {sorted(differing)[0]} "
            f"({len(differing)} tensors in all)."
        )
    with torch.no_grad():
        for name, tensor in weights.items():
            tensor.copy_(stored[name])
    _restore_optimizer(optimizer, read_safetensors(path / OPTIMIZER, RunFolderError))
    _restore_random_states(read_safetensors(path / RANDOM, RunFolderError))
    return state


def newest_whole(checkpoints: list[Path]) -> tuple[Path, State]:
    """Return the newest of `checkpoints` (oldest first) that is as it was written, and its state.

    Raises:
        RunFolderError: None is, or it was written by another version.
    """
    damages: list[str] = []
    for path in reversed(checkpoints):
        try:
            record = _checked(path)
        except RunFolderError as error:
            damages.append(str(error))
            continue
        state = from_fields(State, record["state"], path / STATE)
        if damages:
            _LOG.warning("%s The run goes on from step %d.", " ".join(damages), state.step)
        return path, state
    raise RunFolderError(
        f"No checkpoint in {checkpoints[0].parent} is whole, so the run cannot go on. Restore one from a copy, or "
        f"start anew with overwrite. {' '.join(damages)}"
    )


def _checked(path: Path) -> dict[str, Any]:
    """The content of a checkpoint's state.json, once every file has been held against its digest."""
    record = storage.read_record(path / STATE, RunFolderError)
    if record.keys() != {"state", "files"} or record["files"].keys() != set(TENSOR_FILES):
        raise RunFolderError(f"'{path / STATE}' is not the record of a checkpoint.")
    for name in TENSOR_FILES:
        with storage.reading(path / name, RunFolderError):
            digest = storage.sha256(path / name)
        if digest != record["files"][name]:
            raise RunFolderError(
                f"'{path / name}' is damaged: its SHA-256 is not the one recorded when it was written."
            )
    return record


def from_fields(kind: type[T], fields: Mapping[str, Any], path: Path) -> T:
    """Make a `kind` of the fields that `path` holds.

    Raises:
        RunFolderError: They are not the fields that this version knows.
    """
    try:
        return kind(**fields)
    except TypeError as error:
        raise RunFolderError(
            f"{path} was written by another version of lorakit ({error}). Resume with that version, or start a new run "
            "with from_adapter."
        ) from None


def _require_same(now: Inputs, then: Inputs, path: Path) -> None:
    none = {"source": "none", "sha256": "none"}
    for what, before in then.items():
        after = now.get(what, none)
        if before["sha256"] != after["sha256"]:
            raise RunFolderError(
                f"The {what} has changed since {path} was written: then '{before['source']}' with SHA-256 "
                f"{before['sha256'][:12]}, now '{after['source']}' with {after['sha256'][:12]}. Restore it, or start a "
                "new run with from_adapter."
            )


def _existing(folder: Path) -> list[Path]:
    """Return the checkpoints of `folder`, oldest first."""
    found = [(NAME.fullmatch(entry.name), entry) for entry in folder.iterdir()]
    return [entry for _, entry in sorted((int(m[1]), entry) for m, entry in found if m)]


def _named(optimizer: torch.optim.Optimizer) -> list[tuple[str, nn.Parameter]]:
    return [
        pair
        for group in optimizer.param_groups
        for pair in zip(group["names"], group["params"], strict=True)
    ]


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value
        for name, parameter in _named(optimizer)
        for key, value in optimizer.state[parameter].items()
    }


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    by_name: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parameter, key = name.rsplit("/", 1)
        by_name.setdefault(parameter, {})[key] = tensor
    for name, parameter in _named(optimizer):
        optimizer.state[parameter] = {
            key: tensor.to(parameter.device) for key, tensor in by_name.get(name, {}).items()
        }


def _random_states() -> dict[str, Tensor]:
    """Collect the generators' states: torch's for dropout, Python's and NumPy's for models that draw from them."""
    version, words, gauss = random.getstate()
    assert version == 3
    numpy = np.random.get_state(legacy=False)  # of the generator that the np.random functions share
    assert isinstance(numpy, dict)
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "python.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
        "numpy.position": torch.tensor([numpy["state"]["pos"], numpy["has_gauss"]]),
        "numpy.gauss": torch.tensor([numpy["gauss"]], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            states[f"cuda.{index}"] = state
    return states


def _restore_random_states(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["torch"])
    gauss = states["python.gauss"].tolist()
    random.setstate((3, tuple(states["python"].tolist()), gauss[0] if gauss else None))
    words = states["numpy"].numpy().astype(np.uint32)
    position, has_gauss = states["numpy.position"].tolist()
    np.random.set_state(("MT19937", words, position, has_gauss, states["numpy.gauss"].item()))
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if f"cuda.{index}" in states:
                torch.cuda.set_rng_state(states[f"cuda.{index}"], index)
