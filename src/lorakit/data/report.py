"""The report on the rows of a data set: how many became examples, and what is wrong with the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lorakit.data.data_config import DataConfig
from lorakit.data.rows import Problem
from lorakit.errors import DataError
from lorakit.formatting import listed

SHOWN = 5
"""Maximum number of problems in a message. The report has all of them."""

MANY = 0.1
"""Share of validation examples that are training examples from which on the report says so. A few are usual."""


@dataclass(kw_only=True)
class Report:
    """Count of the rows of a data set by outcome: `read = kept + skipped + held_out`."""

    source: str
    rows: int = 0
    """Number of rows."""
    read: int = 0
    """Number of examples in the rows. Equals `rows` unless rows of a named task hold several examples or none."""
    without: int = 0
    """Rows of a named task without an example: no text is marked good, or the dialogue is empty."""
    kept: int = 0
    truncated: int = 0
    """Kept examples that were cut to `max_length`."""
    held_out: int = 0
    """Examples on the other side of `validation_fraction`."""
    in_train: int | None = None
    """Examples of validation that are training examples too; None if they were not compared."""
    bad: list[Problem] = field(default_factory=list)
    """Skipped invalid rows, with file and line."""
    too_long: list[Problem] = field(default_factory=list)
    """Skipped rows longer than `max_length`, with file and line."""
    unread: list[str] = field(default_factory=list)
    """Columns that neither the task nor a template reads."""
    longest: int = 0
    """Tokens of the longest skipped row; 0 without any."""

    @property
    def skipped(self) -> int:
        """Return the number of skipped rows, bad or too long."""
        return len(self.bad) + len(self.too_long)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-able values."""
        return dataclasses.asdict(self) | {"skipped": self.skipped}

    def __str__(self) -> str:
        rows = "rows" if self.read == self.rows else f"examples in {self.rows:,} rows"
        parts = [f"{self.kept:,} of {self.read:,} {rows}"]
        if self.without:
            parts.append(f"{self.without:,} row{'s hold' if self.without > 1 else ' holds'} none")
        if self.bad:
            parts.append(f"{len(self.bad):,} bad, skipped")
        if self.too_long:
            parts.append(
                f"{len(self.too_long):,} too long, skipped (up to {self.longest:,} tokens)"
            )
        if self.truncated:
            parts.append(f"{self.truncated:,} truncated")
        if self.held_out:
            parts.append(f"{self.held_out:,} on the other side of validation_fraction")
        if self.in_train and self.in_train >= MANY * self.kept:
            parts.append(
                f"{self.in_train:,} are training examples, so scores partly measure memorisation"
            )
        if self.unread:
            parts.append(f"columns that are not read: {listed(self.unread)}")
        return "\n".join([f"{self.source}: {'; '.join(parts)}", *listing(self.bad)])


def stop_at_bad_rows(report: Report, config: DataConfig) -> None:
    """Raise a DataError if rows are invalid and the configuration says stop."""
    if report.bad and config.bad_rows == "stop":
        advice = ["Fix these rows, or set data.bad_rows to skip (--data.bad_rows skip)."]
        if report.unread and any("is missing" in problem.message for problem in report.bad):
            advice.append(
                f"All rows are read from the same columns, and these are not read: {listed(report.unread)}."
            )
        if any("not UTF-8" in problem.message for problem in report.bad):
            advice.append(
                "A file in another encoding can be converted: iconv -f latin1 -t utf-8 OLD > NEW."
            )
        raise DataError(
            f"{report.source}: {len(report.bad):,} of {report.read:,} rows are invalid",
            *listing(report.bad),
            *advice,
        )


def listing(problems: Sequence[Problem]) -> list[str]:
    """Return the first problems, one per line, and the number of the others."""
    lines = [f"  {problem}" for problem in problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"  ... and {len(problems) - SHOWN:,} more")
    return lines
