"""What a published table is, and how the ones in this package are read from their text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from lorakit.errors import ConfigurationError, nearest

Statistic = Literal["mean", "median", "best", "single"]

_NUMBER = r"-?\d+(?:\.\d+)?"
_CELL = re.compile(rf"({_NUMBER})(?: ± ({_NUMBER}))?")
_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9}
_PRIOR_WORK, _RESTRICTED = "*", "†"
_LABELS = ("model", "method", "setting", "parameters")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One published number."""

    value: float
    """As the table prints it, in the table's own unit."""
    spread: float | None = None
    """The number after ±: a standard deviation over seeds; None where none is printed."""
    text: str
    """The cell as printed, digits kept."""

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
    """What tells rows of one method apart beside their size, for example r=8."""
    parameters: str = ""
    """Trained parameters as printed, for example 0.3M."""
    prior_work: bool = False
    """Whether the paper took the row from an earlier one (its star)."""
    restricted: bool = False
    """Whether the row has the restricted setup of Houlsby et al. 2019 (its dagger)."""
    cells: dict[str, Cell]
    """The numbers, by column."""

    @property
    def parameter_count(self) -> float | None:
        """Trained parameters as a number, as exact as the printed label; None without a label."""
        match = re.fullmatch(rf"({_NUMBER})([KMB]?)", self.parameters.replace(",", ""))
        return float(match[1]) * _UNITS[match[2]] if match else None

    @property
    def label(self) -> str:
        """The method with its star or dagger, as the paper prints it."""
        return self.method + _PRIOR_WORK * self.prior_work + _RESTRICTED * self.restricted


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedTable:
    """A table of the paper."""

    name: str
    """table2, for example; numbers are those of arXiv version 2."""
    title: str
    columns: tuple[str, ...]
    """Names of the scores, as the table prints them."""
    rows: tuple[PublishedRow, ...]
    statistic: Statistic
    """What a cell is over the seeds."""
    seeds: int | None = None
    """Runs behind a cell; None where the paper does not say."""
    lower_is_better: tuple[str, ...] = ()
    """Columns in which less is better."""
    notes: tuple[str, ...] = ()
    """What a reader of the numbers has to know, known discrepancies included."""

    def row(
        self, method: str, *, model: str | None = None, setting: str | None = None
    ) -> PublishedRow:
        """Return the first row of a method.

        Raises:
            ConfigurationError: There is none; names the methods there are.
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
            f"{self.name} has no row of {method}{f' on {model}' if model else ''}; its methods are "
            f"{', '.join(methods)}." + nearest(method, methods)
        )


def rows_of(
    text: str, *, model: str | None = None
) -> tuple[tuple[str, ...], tuple[PublishedRow, ...]]:
    """Read a table written as text, columns parted by ``|``.

    The columns model, method, setting and parameters describe a row and all others hold numbers; a method
    that ends in * is prior work, one that ends in † has the restricted setup.

    Args:
        text: The table, its first line naming the columns.
        model: The model of every row, where the table has no such column.

    Returns:
        The names of the columns with numbers, and the rows.

    Raises:
        ValueError: A row has another number of cells, or a cell is no number.
    """
    lines = [[cell.strip() for cell in line.split("|")] for line in text.strip().splitlines()]
    head, *body = lines
    columns = tuple(name for name in head if name not in _LABELS)
    rows = []
    for line in body:
        values = dict(zip(head, line, strict=True))
        method = values["method"]
        rows.append(
            PublishedRow(
                model=values.get("model", model or ""),
                method=method.rstrip(_PRIOR_WORK + _RESTRICTED),
                setting=values.get("setting", ""),
                parameters=values.get("parameters", ""),
                prior_work=_PRIOR_WORK in method,
                restricted=_RESTRICTED in method,
                cells={name: _cell(values[name]) for name in columns},
            )
        )
    return columns, tuple(rows)


def _cell(text: str) -> Cell:
    match = _CELL.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no number")
    return Cell(
        value=float(match[1]), spread=None if match[2] is None else float(match[2]), text=text
    )
