"""Rows of the data, and the problems of rows that cannot be read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the data."""

    values: dict[str, Any]
    origin: str
    """`file:line`, or `file:row n` for formats without lines."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A row that is invalid, with the reason."""

    origin: str
    message: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.message}"


Rows = Iterator[Row | Problem]
