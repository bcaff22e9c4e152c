"""The log of a table: grid.json and one record per run, without weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lorakit import storage
from lorakit.configuration import conform, nested
from lorakit.errors import ConfigurationError, RunFolderError
from lorakit.paper.grid_setup import GridSetup, ParameterCount
from lorakit.paper.paper_config import PaperConfig

GRID = "grid.json"
"""Settings of a grid, and the values that it fixes before its first run."""


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
