"""WikiSQL tables, and the execution of queries on them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

AGGREGATES = ("", "MAX", "MIN", "COUNT", "SUM", "AVG")
OPERATORS = ("=", ">", "<", "OP")
"""Meaning of the indices in a query's `agg` and `conds`, in WikiSQL's order. OP is part of the list but unused."""


@dataclass(frozen=True, slots=True)
class Query:
    """A query of one table: an aggregate of a column over the rows that meet all conditions."""

    column: int
    aggregate: int
    conditions: frozenset[tuple[int, int, str]]
    """Index of the column, index of the operator, value in lower case."""


@dataclass(frozen=True, slots=True)
class Table:
    """Column names of a table, and optionally its rows."""

    header: Sequence[str]
    rows: Sequence[Sequence[Any]] | None = None
    types: Sequence[str] = ()
    """Type of each column, "text" or "real"."""

    def find(self, query: Query) -> list[Any] | None:
        """Return the result of a query in row order, or None if it cannot be executed."""
        import sqlite3  # some builds of Python lack it

        assert self.rows is not None
        conditions, values = [], []
        for column, operator, text in query.conditions:
            value = number_in(text) if self.types[column] == "real" else text
            if value is None or OPERATORS[operator] == "OP":
                return None
            conditions.append(f"col{column} {OPERATORS[operator]} ?")
            values.append(value)
        where = " WHERE " + " AND ".join(conditions) if conditions else ""
        selected = f"{AGGREGATES[query.aggregate]}(col{query.column})"
        columns = ", ".join(f"col{i} {kind}" for i, kind in enumerate(self.types))
        placeholders = ", ".join("?" * len(self.types))
        cells = [[_cell(v, k) for v, k in zip(row, self.types, strict=True)] for row in self.rows]
        with closing(sqlite3.connect(":memory:")) as database:
            try:
                database.execute(f"CREATE TABLE wiki ({columns})")
                database.executemany(f"INSERT INTO wiki VALUES ({placeholders})", cells)
                result = database.execute(f"SELECT {selected} FROM wiki{where}", values)
            except sqlite3.Error:  # e.g. thousands of columns or conditions
                return None
            return [value for (value,) in result]


def normalized(text: object) -> str:
    """Return a text in lower case with white space collapsed to single spaces."""
    return " ".join(str(text).lower().split())


def number_in(text: str) -> float | None:
    """Parse a text as a number after removing commas; otherwise return the first number in it, or None."""
    for candidate in (text.replace(",", ""), *re.findall(r"[-+]?\d*\.\d+|\d+", text)):
        try:
            number = float(candidate)
        except ValueError:
            continue
        if math.isfinite(number):
            return number
    return None


def _cell(value: object, kind: str) -> str | float | None:
    if value is None:
        return None
    if kind == "real" and isinstance(value, (int, float)):
        return float(value)
    return normalized(value)
