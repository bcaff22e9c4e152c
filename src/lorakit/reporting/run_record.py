"""What a run folder tells of its run, read without loading a model; of an unfinished run too."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit import storage
from lorakit.errors import RunFolderError
from lorakit.evaluation.score import DIRECTIONS
from lorakit.training.run_folder import (
    ADAPTER,
    CONFIG,
    ENVIRONMENT,
    METRICS,
    PREDICTION,
    RESULT,
    SAMPLES,
    read_settings,
)


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run, as its folder records it."""

    folder: Path
    config: Mapping[str, Any]
    """Every setting, as in config.yaml."""
    result: Mapping[str, Any] | None = None
    """result.json; None while the run is not finished."""
    sessions: Sequence[Mapping[str, Any]] = ()
    """Machine, versions and command of each session."""
    train: Sequence[Mapping[str, Any]] = ()
    """One record for each step."""
    validation: Sequence[Mapping[str, Any]] = ()
    """One record for each evaluation."""
    samples: Sequence[Mapping[str, Any]] = ()
    """Texts generated at evaluations."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """What the adapter records of its making; empty before there is one."""
    base: Mapping[str, Any] = field(default_factory=dict)
    """What the adapter records of its base."""
    adapter_bytes: int | None = None
    """Size of the adapter's weights file."""
    predicted: Mapping[str, float] = field(default_factory=dict)
    """What was expected of it before it began, by the keys of `lorakit.reporting.run_report.PREDICTED`."""
    label: str | None = None
    """What to call it instead of its folder's name."""

    @property
    def name(self) -> str:
        """What it is called: its folder's name by default."""
        return self.label or self.folder.resolve().name

    @property
    def method(self) -> str:
        """The method's name."""
        return str(self.config.get("method", ""))

    @property
    def base_name(self) -> str:
        """The base model, as the configuration names it."""
        base = self.config.get("base")
        return str(base.get("name", "")) if isinstance(base, Mapping) else ""

    @property
    def sizes(self) -> Mapping[str, int]:
        """Numbers of parameters and bytes, as far as the run recorded them."""
        for session in reversed(self.sessions):
            if isinstance(sizes := session.get("sizes"), Mapping):
                return sizes
        return {}

    @property
    def command(self) -> str | None:
        """The command that began the run."""
        command = self.sessions[0].get("command") if self.sessions else None
        return command if isinstance(command, str) else None

    def points(self, split: str, name: str) -> list[tuple[float, float]]:
        """The values of a metric over the steps."""
        records = self.train if split == "train" else self.validation
        return [
            (float(record["step"]), float(value))
            for record in records
            if isinstance(value := record.get(name), (int, float)) and math.isfinite(value)
        ]

    def scores(self, which: str) -> dict[str, float]:
        """Validation scores: "before", "after" (the last there are) or "best"."""
        if self.result is not None:
            key = {"before": "scores_before", "after": "scores", "best": "best_scores"}[which]
            found = self.result.get(key) or {}
        elif which == "best" or not self.validation:
            found = {}
        else:
            found = self.validation[0 if which == "before" else -1]
            if which == "before" and found.get("step") != 0:
                found = {}
        order = [*DIRECTIONS, *(name for name in found if name not in DIRECTIONS)]  # loss first
        return {
            name: float(value)
            for name in order
            if name not in ("step", "split") and isinstance(value := found.get(name), (int, float))
        }

    def total(self, name: str) -> float | None:
        """Tokens, computed_tokens or seconds of all steps so far."""
        last = self.result if self.result is not None else (self.train[-1] if self.train else {})
        value = last.get(name)
        return float(value) if isinstance(value, (int, float)) else None


def read_run(folder: str | Path) -> RunRecord:
    """Read a run folder, finished or not.

    Raises:
        RunFolderError: It is no run folder, or a file in it is damaged.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise RunFolderError(
            f"'{folder}' is not a run folder: it has no {CONFIG}. Name the output of a `lorakit train`."
        )
    config = read_settings(folder)
    if not config:
        raise RunFolderError(f"'{folder / CONFIG}' is not the configuration of a run.")
    metrics = _lines(folder / METRICS)
    weights = sorted((folder / ADAPTER).glob("*.safetensors"))
    about = _record(folder / ADAPTER / "lorakit.json", checked=False)
    return RunRecord(
        folder=folder,
        config=config,
        result=_record(folder / RESULT) or None,
        sessions=[s for s in _record(folder / ENVIRONMENT).get("sessions", []) if _is_map(s)],
        train=[record for record in metrics if record.get("split") == "train"],
        validation=[record for record in metrics if record.get("split") == "validation"],
        samples=_lines(folder / SAMPLES),
        provenance=_map(about.get("provenance")),
        base=_map(about.get("base")),
        predicted={
            name: float(value)
            for name, value in _record(folder / PREDICTION).items()
            if isinstance(value, (int, float))
        },
        adapter_bytes=sum(path.stat().st_size for path in weights) if weights else None,
    )


def _record(path: Path, *, checked: bool = True) -> dict[str, Any]:
    if not path.is_file():
        return {}
    read = storage.read_record if checked else storage.read_json
    return read(path, RunFolderError)


def _lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; a last line without its end is one that is being written."""
    if not path.exists():
        return []
    with storage.reading(path, RunFolderError):
        *lines, _ = path.read_text(encoding="utf-8").split("\n")
    found = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            raise RunFolderError(
                f"{path}:{number} is damaged: it is no object with a step. Delete that line to go on."
            )
        found.append(record)
    return found


def _is_map(value: Any) -> bool:
    return isinstance(value, Mapping)


def _map(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
