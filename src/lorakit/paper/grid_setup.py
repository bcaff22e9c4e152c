"""The values that a grid fixes before its first run, as saved in grid.json."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


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
