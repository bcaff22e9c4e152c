"""Tables of numbers by layer, with one line per layer or per kind of layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from lorakit.analysis.deltas import families
from lorakit.cli.console import console, literal, table
from lorakit.formatting import number_range

Cell = float | int | str | None


def layer_table(
    rows: Mapping[str, Mapping[str, Cell]], *, each: bool, what: str = "matrix"
) -> Table:
    """Return a table with the name and the numbers of each layer.

    Args:
        rows: For each name, its numbers by heading. All names have the same headings.
        each: Print one line per layer. Otherwise layers that differ only in their block number share a line with
            the smallest and largest value.
        what: Heading of the names.
    """
    groups = {name: {name: cells} for name, cells in rows.items()} if each else families(rows)
    headings = list(next(iter(rows.values()), {}))
    result = table([what, *([] if each else ["count"]), *headings], ())
    # Keep names in one piece where that leaves half of the width for numbers, and at least 30 columns: they then fold
    # first. With less, or with `min_width`, rich would cut columns off.
    result.columns[0].no_wrap = 2 * max([30, *map(len, groups)]) <= console().width
    for name, group in groups.items():
        spreads = [_spread([cells[heading] for cells in group.values()]) for heading in headings]
        result.add_row(*map(literal, [name, *([] if each else [str(len(group))]), *spreads]))
    return result


def _spread(cells: Sequence[Cell]) -> str:
    numbers = [cell for cell in cells if isinstance(cell, (int, float))]
    if numbers:
        return number_range(numbers)
    return ", ".join(dict.fromkeys("-" if cell is None else str(cell) for cell in cells))
