"""The classes of a published table, and the parser for its rows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from lorakit.errors import ConfigurationError, nearest

_NUMBER = r"-?\d+(?:\.\d+)?"
_CELL = re.compile(rf"({_NUMBER})(?: ± ({_NUMBER}))?")
_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9}
_PRIOR_WORK, _RESTRICTED = "*", "†"
_LABELS = ("model", "method", "setting", "parameters")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One published number."""

    value: float
    """As printed, in the table's unit."""
    spread: float | None = None
    """The number after ±: a standard deviation over seeds; None if none is printed."""
    text: str
    """The cell as printed, with all digits."""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedRow:
    """One row of a published table."""

    model: str
    """The model's name in lorakit, for example roberta-base."""
    method: str
    """The paper's name of the method, for example AdapterH."""
    setting: str = ""
    """Distinguishes rows of one method, for example r=8."""
    parameters: str = ""
    """Trained parameters as printed, for example 0.3M."""
    prior_work: bool = False
    """Whether the paper quotes the row from an earlier one (its star)."""
    restricted: bool = False
    """Whether the row uses the restricted setup of Houlsby et al. 2019 (its dagger)."""
    cells: dict[str, Cell]
    """The numbers, by column."""

    @property
    def parameter_count(self) -> float | None:
        """Trained parameters as a number, to the printed digits; None if none are printed."""
        match = re.fullmatch(rf"({_NUMBER})([KMB]?)", self.parameters.replace(",", ""))
        return float(match[1]) * _UNITS[match[2]] if match else None

    @property
    def label(self) -> str:
        """The method with its star or dagger, as printed."""
        return self.method + _PRIOR_WORK * self.prior_work + _RESTRICTED * self.restricted


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedTable:
    """A table of the paper."""

    name: str
    """For example table2, as numbered in arXiv version 2."""
    title: str
    rows: tuple[PublishedRow, ...]
    statistic: Literal["mean", "median", "best", "single"]
    """The statistic over the seeds that a cell prints."""
    seeds: int | None = None
    """Runs per cell; None if the paper does not say."""
    lower_is_better: tuple[str, ...] = ()
    """Columns in which a lower value is better."""
    notes: tuple[str, ...] = ()
    """Facts needed to read the numbers, including known discrepancies."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the scores, as printed."""
        return tuple(self.rows[0].cells)

    def row(
        self, method: str, *, model: str | None = None, setting: str | None = None
    ) -> PublishedRow:
        """Return the first row of a method.

        Raises:
            ConfigurationError: No row matches; the message lists the methods.
        """
        for row in self.rows:
            if (
                row.method == method
                and model in (None, row.model)
                and setting in (None, row.setting)
            ):
                return row
        methods = list(dict.fromkeys(row.method for row in self.rows))
        raise ConfigurationError(
            f"{self.name} has no row for {method}{f' on {model}' if model else ''}; its methods are "
            f"{', '.join(methods)}." + nearest(method, methods)
        )


def rows_of(text: str, *, model: str = "") -> tuple[PublishedRow, ...]:
    """Parse the rows of a table written as text, with ``|`` between columns.

    The columns model, method, setting and parameters describe a row; all others hold numbers. A method
    that ends in * is prior work; one that ends in † uses the restricted setup.

    Args:
        text: The table; its first line names the columns.
        model: The model of every row, if the table has no such column.

    Raises:
        ValueError: A row has the wrong number of cells, or a cell is not a number.
    """
    head, *body = ([cell.strip() for cell in line.split("|")] for line in text.strip().splitlines())
    rows = []
    for line in body:
        values = dict(zip(head, line, strict=True))
        method = values["method"]
        rows.append(
            PublishedRow(
                model=values.get("model", model),
                method=method.rstrip(_PRIOR_WORK + _RESTRICTED),
                setting=values.get("setting", ""),
                parameters=values.get("parameters", ""),
                prior_work=_PRIOR_WORK in method,
                restricted=_RESTRICTED in method,
                cells={name: _cell(values[name]) for name in head if name not in _LABELS},
            )
        )
    return tuple(rows)


def _cell(text: str) -> Cell:
    match = _CELL.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a number; write a number such as 70.4 or 70.4 ± 0.1")
    return Cell(
        value=float(match[1]), spread=None if match[2] is None else float(match[2]), text=text
    )
