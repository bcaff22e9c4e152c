"""Checkpoints: all that a run needs to go on as if it had not been interrupted.

A checkpoint is a folder ``step-000100`` of

- ``weights.safetensors``: the trained tensors, in the precision they are trained in;
- ``optimizer.safetensors``: AdamW's two means and step count of each;
- ``random.safetensors``: the states of the random generators that dropout draws from;
- ``state.json``: the counters below, and the digests of the other files.

The position in the data is the step number itself (see schedule.py). A folder appears under its name only when it is
complete, so the newest one is always whole; it is checked against its digests nevertheless, since disks fail.
"""

from __future__ import annotations

import dataclasses
import random
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorakit import storage
from lorakit.data.batches import token_count
from lorakit.errors import LorakitError, RunFolderError

WEIGHTS, OPTIMIZER, RANDOM, STATE = (
    "weights.safetensors",
    "optimizer.safetensors",
    "random.safetensors",
    "state.json",
)
TENSOR_FILES = (WEIGHTS, OPTIMIZER, RANDOM)
NAME = re.compile(r"step-(\d{6,})")


@dataclass(kw_only=True)
class State:
    """How far a run has come."""

    step: int = 0
    """Finished optimizer steps."""
    started: bool = False
    """Whether the evaluation before the first step is done."""
    tokens: int = 0
    """Tokens computed, without padding."""
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
    data: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the data's sources by split: a run must not go on with other data."""

    def advance(self, loss: float, batches: Iterable[Mapping[str, Tensor]], seconds: float) -> None:
        """Count a finished step."""
        self.step += 1
        self.train_loss = loss
        self.tokens += sum(token_count(batch) for batch in batches)
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
        _save(dict(weights), temporary / WEIGHTS)
        _save(_optimizer_tensors(optimizer), temporary / OPTIMIZER)
        _save(_random_states(), temporary / RANDOM)
        digests = {name: storage.sha256(temporary / name) for name in TENSOR_FILES}
        storage.write_json(temporary / STATE, {**dataclasses.asdict(state), "sha256": digests})
    for old in _existing(folder)[:-keep]:
        shutil.rmtree(old)


def restore(
    folder: Path,
    weights: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    data: dict[str, str],
) -> State:
    """Put the newest checkpoint of `folder` into `weights`, `optimizer` and the random generators.

    Returns its state; that of a run which has not begun where there is no checkpoint.

    Raises:
        RunFolderError: The checkpoint is damaged, or is that of other tensors or other `data`.
    """
    existing = _existing(folder)
    if not existing:
        return State(data=data)
    path = existing[-1]
    state = storage.read_json(path / STATE)
    digests = state.pop("sha256")
    for name in TENSOR_FILES:
        if not (path / name).exists() or storage.sha256(path / name) != digests[name]:
            raise RunFolderError(
                f"{path / name} is damaged: its SHA-256 is not the one recorded when it was written. Delete {path} "
                "to resume from the checkpoint before it."
            )
    for split, digest in state["data"].items():
        if data.get(split) != digest:
            raise RunFolderError(
                f"The {split} data has changed since {path} was written (SHA-256 {digest[:12]} then, "
                f"{data.get(split, 'none')[:12]} now). Restore it, or start a new run with from_adapter."
            )
    stored = _load(path / WEIGHTS)
    if differing := stored.keys() ^ weights.keys():
        raise RunFolderError(
            f"{path} does not fit this run: only one of the two has {sorted(differing)[0]} "
            f"({len(differing)} tensors in all)."
        )
    with torch.no_grad():
        for name, tensor in weights.items():
            tensor.copy_(stored[name])
    _restore_optimizer(optimizer, _load(path / OPTIMIZER))
    _restore_random_states(_load(path / RANDOM))
    try:
        return State(**state)
    except TypeError as error:
        raise RunFolderError(
            f"{path / STATE} was written by another version of lorakit ({error}). Resume with that version, or start "
            "a new run with from_adapter."
        ) from None


def _existing(folder: Path) -> list[Path]:
    """Return the checkpoints of `folder`, oldest first."""
    found = [(NAME.fullmatch(entry.name), entry) for entry in folder.iterdir()]
    return [entry for _, entry in sorted((int(m[1]), entry) for m, entry in found if m)]


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise RunFolderError(f"{path} is damaged: {error}.") from None


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
