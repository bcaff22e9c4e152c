"""Calculated adapters on disk: an adapter folder with what it was made from, scored if there is data."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lorakit import storage
from lorakit.adapters import formats
from lorakit.adapters.formats import lorakit_json, peft
from lorakit.adapters.formats.card import card
from lorakit.adapters.formats.peft.reading import PICKLE_NAME
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.analysis.checkpoints import is_checkpoint, saved_adapter
from lorakit.analysis.deltas import read
from lorakit.analysis.derived import Derived
from lorakit.data import DataConfig
from lorakit.errors import ConfigurationError
from lorakit.evaluation.decoding import Decoding
from lorakit.evaluation.evaluate import evaluate
from lorakit.evaluation.evaluate_config import EvaluateConfig, Score
from lorakit.models.base_config import BaseConfig
from lorakit.training.checkpoint import WEIGHTS
from lorakit.training.environment import versions

TENSORS = (peft.TENSORS_NAME, lorakit_json.TENSORS_NAME, PICKLE_NAME, WEIGHTS)


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """How a calculated adapter is scored beside what it was made from."""

    data: DataConfig = field(default_factory=DataConfig)
    """Data to score the result and its inputs on, as for lorakit evaluate; without any nothing is scored."""
    split: Literal["validation", "test"] = "test"
    """Which of the data's held-out parts is scored."""
    scores: tuple[Score, ...] = ("loss",)
    """For text generation: the held-out loss, the scores of generated text, or both."""
    limit: int | None = None
    """Score this many prompts, from the first; none scores all."""
    decoding: Decoding = field(default_factory=Decoding)
    """How text is generated."""
    batch_size: int = 16
    """Examples per forward pass where nothing is generated."""

    @property
    def wanted(self) -> bool:
        """Whether there is something to score on.

        Raises:
            ConfigurationError: There is data, and none of it for the split that is scored.
        """
        if self.data == DataConfig():
            return False
        if self.data.source(self.split) is None:
            raise ConfigurationError(
                f"data names nothing to score on: split is {self.split}. Set data.{self.split}, or split."
            )
        return True


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A calculated adapter that was written."""

    folder: Path
    scores: dict[str, dict[str, float]]
    """Scores of the inputs, by name, and of the "result"; empty where nothing was scored."""
    notices: list[str]
    """What the user should know, in sentences."""


def save(
    made: Derived,
    output: str | Path,
    *,
    inputs: Sequence[str | Path],
    settings: dict[str, Any],
    alpha: float | None = None,
    scoring: ScoringConfig | None = None,
    base: BaseConfig | None = None,
    allow_other_base: bool = False,
    overwrite: bool = False,
) -> Saved:
    """Write a calculated adapter as a folder, whole or not at all, and score it beside its inputs.

    lorakit.json and the card record the settings, the inputs with the digest of their tensors, and the scores.

    Args:
        made: What was calculated.
        output: Where to write; must not exist unless `overwrite`.
        inputs: The adapters or models it was made from.
        settings: What to record of how it was made; JSON values.
        alpha: The constant of loralib files among the inputs.
        scoring: What to score on; None, or one without data, scores nothing.
        base: The base to score on; None takes the one that the adapter records.
        allow_other_base: Score on another base than the recorded one.
        overwrite: Replace an existing adapter folder.

    Raises:
        RunFolderError: The folder exists, is none of an adapter's, or cannot be written.
        LorakitError: The data or the base cannot be read, or do not fit the adapter.
    """
    check_output(output, overwrite=overwrite)
    adapters = {Path(path): _folder(Path(path)) for path in inputs if _is_adapter(Path(path))}
    first = next(iter(adapters.values()), None)
    provenance = {
        **made.adapter.provenance,
        "config": settings,
        "made_from": [_origin(Path(path)) for path in inputs],
        "error": made.error,
        "versions": versions(),
    }
    for_peft = not any(_beyond_peft(folder) for folder in adapters.values())
    scores: dict[str, dict[str, float]] = {}
    if scoring is not None and scoring.wanted:
        for path, folder in adapters.items():
            scores[str(path)] = _score(
                read(path, alpha=alpha), folder, scoring, base, allow_other_base
            )
        scores["result"] = _score(made.adapter, first, scoring, base, allow_other_base)
        provenance["scores"] = scores["result"]
    stored = dataclasses.replace(made.adapter, provenance=provenance)
    with storage.atomic_folder(output, overwrite=overwrite) as temporary:
        notices = _write(stored, temporary, first, for_peft=for_peft)
    return Saved(folder=Path(output), scores=scores, notices=notices)


def check_output(output: str | Path, *, overwrite: bool = False) -> None:
    """Refuse, before long work, what `save` would refuse after it.

    Raises:
        RunFolderError: The folder exists, is none of an adapter's, or cannot be written.
    """
    storage.require_free_folder(output, overwrite=overwrite)
    formats.check_replaceable(output)


def _score(
    stored: StoredAdapter,
    tokenizer_from: Path | None,
    scoring: ScoringConfig,
    base: BaseConfig | None,
    allow_other_base: bool,
) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        _write(stored, Path(folder), tokenizer_from, for_peft=False)
        settings = {f.name: getattr(scoring, f.name) for f in dataclasses.fields(ScoringConfig)}
        config = EvaluateConfig(
            **settings, base=base, adapter=folder, allow_other_base=allow_other_base
        )
        return evaluate(config).scores


def _write(
    stored: StoredAdapter, folder: Path, tokenizer_from: Path | None, *, for_peft: bool
) -> list[str]:
    """Write an adapter folder, without PEFT's files unless `for_peft`."""
    if tokenizer_from is not None:
        formats.copy_tokenizer(tokenizer_from, folder)
    if for_peft:
        return formats.write(stored, folder)
    lorakit_json.write_tensors(stored, folder)
    (folder / lorakit_json.CARD_NAME).write_bytes(card(stored, None).encode())
    lorakit_json.write(stored, folder, None)
    return ["Only lorakit can load this folder, as it is with the one that it was made from."]


def _is_adapter(path: Path) -> bool:
    marks = (lorakit_json.NAME, peft.CONFIG_NAME)
    return path.is_file() or is_checkpoint(path) or any((path / mark).exists() for mark in marks)


def _folder(path: Path) -> Path:
    """Where an adapter's other files lie: beside its tensors; for a checkpoint with its run's adapter."""
    return saved_adapter(path) if is_checkpoint(path) else path


def _beyond_peft(path: Path) -> bool:
    """Whether PEFT cannot load a folder of lorakit's; the reason may be the base's own layers."""
    return (path / lorakit_json.NAME).exists() and not (path / peft.CONFIG_NAME).exists()


def _origin(path: Path) -> dict[str, Any]:
    """What an input was: its name, and the digest of its tensors where it is an adapter."""
    files = [path] if path.is_file() else [path / name for name in TENSORS]
    digests = [storage.sha256(file) for file in files if file.is_file()]
    return {"name": path.name, "sha256": digests[0] if digests else None}
