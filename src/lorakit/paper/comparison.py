"""From the records of a grid to rows like the paper's, and to what they say of LoRA."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lorakit.paper.grid import Grid
from lorakit.paper.published import Cell, PublishedRow
from lorakit.paper.study import StudyData, Variant

Verdict = Literal["ahead", "level", "behind", "open"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One number of ours, in the table's unit."""

    value: float
    """Median or mean over the seeds, as in the paper's table."""
    spread: float | None
    """Standard deviation over the seeds; None with one."""
    seeds: dict[int, float]
    """The number of each seed whose training did not diverge."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnRow:
    """A row of ours."""

    variant: Variant
    trained: int | None
    """Trained parameters, a new task head left out; None where the method does not fit the base."""
    left_out: str
    """Why the method does not fit."""
    cells: dict[str, Measured]
    """The numbers that there are, by column."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """LoRA against another method in one column, a positive value meaning that LoRA is better."""

    column: str
    other: str
    """Key of the other variant."""
    value: float
    spread: float | None
    """Standard deviation of the difference of two runs; None where a side has one seed."""
    verdict: Verdict
    """ahead or behind where the difference exceeds the spread, else level; open with one seed."""
    published: tuple[str, float] | None
    """The same difference in the paper, and the model there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The paper's rows and ours."""

    grid: Grid
    columns: tuple[str, ...]
    """Columns that both have, in the paper's order."""
    published: tuple[PublishedRow, ...]
    own: tuple[OwnRow, ...]
    differences: tuple[Difference, ...]

    @property
    def digits(self) -> dict[str, int]:
        """Digits after the point, by column."""
        found = {c.name: c.digits for d in self.grid.study.data_sets for c in d.columns}
        return {name: found.get(name, 1) for name in self.columns}


def compare(grid: Grid) -> Comparison:
    """Put the rows of a grid, as far as they are there, beside those of the paper."""
    study = grid.study
    sets = {column.name: data_set for data_set in study.data_sets for column in data_set.columns}
    columns = tuple(name for name in study.table.columns if name in sets)
    averaged = study.average is not None and len(columns) > 1
    own = [_own_row(grid, variant, sets) for variant in study.variants]
    published = [
        PublishedRow(
            model=row.model,
            method=row.method,
            setting=row.setting,
            parameters=row.parameters,
            prior_work=row.prior_work,
            restricted=row.restricted,
            cells={name: row.cells[name] for name in columns},
        )
        for row in study.table.rows
        if _is_asked_for(row, grid)
    ]
    if averaged:
        assert study.average is not None
        for row in published:
            value = statistics.fmean(cell.value for cell in row.cells.values())
            row.cells[study.average] = Cell(value=value, text=f"{value:.1f}")
        for row in own:
            if row.cells.keys() == set(columns):
                row.cells[study.average] = _average(list(row.cells.values()), _centre(grid))
        columns += (study.average,)
    differences = [
        _difference(grid, lora, other, column, published)
        for lora in own
        if lora.variant.key == "lora"
        for other in own
        if other.variant.method != "LoRA"
        for column in columns
        if column in lora.cells and column in other.cells
    ]
    return Comparison(
        grid=grid,
        columns=columns,
        published=tuple(published),
        own=tuple(own),
        differences=tuple(differences),
    )


def _is_asked_for(row: PublishedRow, grid: Grid) -> bool:
    """Whether a published row has a row of ours beside it: all have, but in studies of settings."""
    variants = grid.study.variants
    if any(variant.method != "LoRA" for variant in variants):
        return True
    return any(variant.setting == row.setting for variant in variants)


def _own_row(grid: Grid, variant: Variant, sets: dict[str, StudyData]) -> OwnRow:
    counts = [grid.setup.counts[data_set.key][variant.key] for data_set in grid.study.data_sets]
    fitting = [count for count in counts if not count.left_out]
    cells: dict[str, Measured] = {}
    for data_set in {d.key: d for d in sets.values()}.values():
        if grid.setup.counts[data_set.key][variant.key].left_out:
            continue
        records = grid.records(data_set, variant)
        for column in data_set.columns:
            found = {record.seed: record.score(column.score) for record in records}
            values = {
                seed: value * column.scale for seed, value in found.items() if value is not None
            }
            if values:
                cells[column.name] = _measured(values, _centre(grid))
    return OwnRow(
        variant=variant,
        trained=fitting[0].trained if fitting else None,
        left_out="" if fitting else counts[0].left_out,
        cells=cells,
    )


def _centre(grid: Grid) -> Any:
    return statistics.median if grid.study.table.statistic == "median" else statistics.fmean


def _measured(seeds: dict[int, float], centre: Any) -> Measured:
    spread = statistics.stdev(seeds.values()) if len(seeds) > 1 else None
    return Measured(value=centre(seeds.values()), spread=spread, seeds=seeds)


def _average(cells: Sequence[Measured], centre: Any) -> Measured:
    """The mean over columns, of the numbers as shown; its spread is that of the means by seed."""
    value = statistics.fmean(cell.value for cell in cells)
    common = sorted(set.intersection(*(set(cell.seeds) for cell in cells)))
    by_seed = {seed: statistics.fmean(cell.seeds[seed] for cell in cells) for seed in common}
    spread = _measured(by_seed, centre).spread if by_seed else None
    return Measured(value=value, spread=spread, seeds=by_seed)


def _difference(
    grid: Grid, lora: OwnRow, other: OwnRow, column: str, published: Sequence[PublishedRow]
) -> Difference:
    sign = -1 if column in grid.study.table.lower_is_better else 1
    ours, theirs = lora.cells[column], other.cells[column]
    value = sign * (ours.value - theirs.value)
    spread = None
    verdict: Verdict = "open"
    if ours.spread is not None and theirs.spread is not None:
        spread = math.hypot(ours.spread, theirs.spread)
        verdict = "level" if abs(value) <= spread else "ahead" if value > 0 else "behind"
    return Difference(
        column=column,
        other=other.variant.key,
        value=value,
        spread=spread,
        verdict=verdict,
        published=_published_difference(published, other.variant.method, column, sign),
    )


def _published_difference(
    rows: Sequence[PublishedRow], method: str, column: str, sign: int
) -> tuple[str, float] | None:
    """LoRA minus a method on the first model of the paper that has both, in like setups where there are any."""
    for restricted in (False, True):
        for model in dict.fromkeys(row.model for row in rows):
            mine = [r for r in rows if r.model == model and r.restricted == restricted]
            lora = next((r for r in mine if r.method == "LoRA"), None)
            other = next((r for r in mine if r.method == method), None)
            if lora is not None and other is not None:
                return model, sign * (lora.cells[column].value - other.cells[column].value)
    return None
