"""The log of a table: grid.json and one record per run, without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorakit import storage
from lorakit.errors import ConfigurationError, RunFolderError
from lorakit.evaluation.decoding import Decoding
from lorakit.models.base_config import BaseConfig
from lorakit.paper.paper_config import PaperConfig

GRID = "grid.json"
"""Settings of a grid, and the values that it fixes before its first run."""


def recorded_config(log: Path) -> PaperConfig:
    """Return the configuration of a log: its settings, and the data sets, methods and seeds that it has so far.

    Raises:
        ConfigurationError: The folder is not a log.
        RunFolderError: The log is damaged, or another version of lorakit wrote it.
    """
    path = log / GRID
    if not path.exists():
        raise ConfigurationError(f"'{log}' is not the log of a table: it has no {GRID}.")
    content = storage.read_record(path, RunFolderError)
    shared: dict[str, Any] = {}
    sections: dict[str, dict[str, Any]] = {"base": {}, "decoding": {}}
    try:
        for name, value in content["settings"].items():
            section, dot, key = name.partition(".")
            (sections[section] if dot else shared)[key or name] = value
        sections["base"]["dtype"] = content["plan"]["dtype"] or sections["base"]["dtype"]
        counts = content["plan"]["counts"]
    except (KeyError, AttributeError, TypeError) as error:
        raise RunFolderError(
            f"Another version of lorakit wrote '{path}' ({type(error).__name__}: {error}). Choose another log."
        ) from None
    runs = log.glob("runs/*/*/rate-*-seed-*.json")
    seeds = [int(run.stem.rpartition("-")[2]) for run in runs]
    return PaperConfig(
        **{
            **shared,
            "base": BaseConfig(**sections["base"]),
            "decoding": Decoding(**sections["decoding"]),
            "tasks": tuple(counts),
            "methods": tuple(
                dict.fromkeys(v for by_variant in counts.values() for v in by_variant)
            ),
            "seeds": 1 + max(seeds, default=0),
            "log": str(log),
        }
    )
