"""The serving systems to compare. Each module has ``start(setup, **settings) -> System`` (benchmarks.serving_load)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Setup:
    """What every system serves."""

    base: Path
    """A model folder without end tokens."""
    adapters: Path
    """PEFT folders by name."""
    dtype: str
    """Dtype of the weights, for systems that have a choice."""
    threads: int


class UnavailableError(Exception):
    """The system cannot run on this machine, or not with so many adapters."""
