"""The log of a table, without weights: one record per run, and grid.json, which a grid fixes before its first run."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit import storage
from lorakit.configuration import conform, nested
from lorakit.errors import ConfigurationError, RunFolderError
from lorakit.paper.paper_config import PaperConfig

GRID = "grid.json"
"""Settings of a grid, and its `GridSetup`."""


@dataclass(kw_only=True, slots=True)
class ParameterCount:
    """Parameters that a variant trains on the base of a data set."""

    trained: int | None = None
    """Without a new task head, as the paper counts; None if the method does not fit the base."""
    head: int = 0
    """Parameters of the new task head, which is also trained."""
    left_out: str = ""
    """Why the method does not fit the base; empty if it does."""


@dataclass(kw_only=True)
class GridSetup:
    """The values that a grid fixes before its first run. A resumed grid keeps them."""

    dtype: str = ""
    """Compute dtype of every run."""
    counts: dict[str, dict[str, ParameterCount]] = field(default_factory=dict)
    """By data set and variant."""
    steps: dict[str, int] = field(default_factory=dict)
    """Steps per run, by data set; empty without a budget."""
    timing: dict[str, Any] = field(default_factory=dict)
    """The measurements that converted the budget to steps, by data set."""
    training: dict[str, str] = field(default_factory=dict)
    """Names of the files with the drawn training data, by data set."""
    rows: dict[str, int] = field(default_factory=dict)
    """Number of drawn rows that are not held out, by data set; logs of earlier versions lack it."""
    held_out: dict[str, float] = field(default_factory=dict)
    """Share of the training data that is held out, by data set."""


def recorded_config(log: Path) -> PaperConfig:
    """Return the configuration of a log: its settings, and the data sets, methods and seeds that it has so far.

    Raises:
        LorakitError: As for `read_log`.
    """
    settings, setup = read_log(log)
    seeds = [_seed_of(path) for path in log.glob("runs/*/*/rate-*-seed-*.json")]
    variants = dict.fromkeys(v for by_variant in setup.counts.values() for v in by_variant)
    return PaperConfig(
        **{
            **nested(settings),
            "tasks": tuple(setup.counts),
            "methods": tuple(variants),
            "seeds": 1 + max(seeds, default=0),
            "log": str(log),
        }
    )


def _seed_of(path: Path) -> int:
    """Return the seed in the name of a record. A huge one would make the grid list as many runs."""
    match = re.search(r"-seed-(\d{1,4})$", path.stem)
    if match is None:
        raise RunFolderError(
            f"'{path}' is not the record of a run: its name must end in a seed below 10,000. Delete the file."
        )
    return int(match[1])


def read_log(log: Path) -> tuple[dict[str, Any], GridSetup]:
    """Return the settings of a log by dotted name, and the values that its grid fixed before its first run.

    Raises:
        ConfigurationError: The folder is not a log.
        RunFolderError: The log is damaged, or another version of lorakit wrote it.
    """
    path = log / GRID
    if not path.exists():
        raise ConfigurationError(f"'{log}' is not the log of a table: it has no {GRID}.")
    content = storage.read_record(path, RunFolderError)
    try:
        counts = {
            data_set: {variant: ParameterCount(**count) for variant, count in by_variant.items()}
            for data_set, by_variant in content["plan"].pop("counts").items()
        }
        setup = GridSetup(counts=counts, **content["plan"])
        for values in (setup, *(count for by in counts.values() for count in by.values())):
            conform(values)
        return dict(content["settings"]), setup
    except (KeyError, AttributeError, TypeError, ValueError, ConfigurationError) as error:
        raise RunFolderError(
            f"Another version of lorakit wrote '{path}' ({type(error).__name__}: {error}). Choose another log."
        ) from None
