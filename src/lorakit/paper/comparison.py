"""Aggregate the records of a grid into rows like the paper's, and compare LoRA with the other methods."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lorakit.errors import RunFolderError
from lorakit.paper.grid import Grid
from lorakit.paper.published import Cell, PublishedRow
from lorakit.paper.resampling import interval_over_examples
from lorakit.paper.study import Variant

ROUNDING = 1e-9
"""Largest difference of equal scores, in the table's unit."""

Verdict = Literal["ahead", "undecided", "behind", "open"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One measured number, in the table's unit."""

    value: float
    """Median or mean over the seeds, as in the paper's table."""
    mean: float
    spread: float | None
    """Standard deviation (n - 1) over the seeds; None with one seed."""
    seeds: dict[int, float]
    """The number by seed, without seeds whose training diverged; empty for an average over data sets."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnRow:
    """A measured row."""

    variant: Variant
    trained: int | None
    """Trained parameters without a new task head; None if the method does not fit the base."""
    left_out: str
    """Why the method does not fit the base; empty if it does."""
    cells: dict[str, Measured]
    """The numbers measured so far, by column."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """LoRA against another method in one column; a positive value means that LoRA is better."""

    column: str
    other: str
    """Key of the other variant."""
    value: float
    """Mean difference of the runs with the same seed, which see the data in the same order; of an average over data
    sets, the difference of the means."""
    interval: tuple[float, float] | None
    """95 % confidence interval of that mean (Student's t over the seeds); None with one common seed, for an average, or
    if the differences of all seeds are equal and not zero."""
    over_examples: tuple[float, float] | None
    """95 % interval of that mean over the choice of the scored examples, for the seeds at hand; None if the records
    lack what it needs."""
    verdict: Verdict
    """ahead or behind if the interval over the seeds excludes zero, else undecided; open without one."""
    published: tuple[str, float] | None
    """The paper's model, and the same difference on it; None if the paper has no such pair."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The published rows and the measured rows."""

    grid: Grid
    columns: tuple[str, ...]
    """The common columns, in the paper's order."""
    published: tuple[PublishedRow, ...]
    own: tuple[OwnRow, ...]
    differences: tuple[Difference, ...]

    @property
    def digits(self) -> dict[str, int]:
        """Decimal places, by column."""
        digits = {c.name: c.digits for d in self.grid.study.data_sets for c in d.columns}
        return {name: digits.get(name, 1) for name in self.columns}

    @property
    def chance_note(self) -> str:
        """The chance that an interval excludes zero without a cause; empty with at most one interval."""
        count = sum(difference.interval is not None for difference in self.differences)
        if count < 2:
            return ""
        return (
            f"The {count} intervals are not corrected for their number: if no method differed from LoRA, at least one "
            f"would exclude zero with a chance of up to {min(5 * count, 100)} %."
        )

    @property
    def published_notes(self) -> tuple[str, ...]:
        """Facts needed to read the published numbers."""
        table, average = self.grid.study.table, self.grid.study.average
        if average not in self.columns or set(self.columns) == set(table.columns):
            return table.notes
        note = f"{average} of a published row is the mean of the columns shown here; the paper prints no such number."
        return (*table.notes, note)

    @property
    def labels(self) -> dict[str, str]:
        """Labels of the measured rows, by key."""
        return {row.variant.key: row.variant.label for row in self.own}


def compare(grid: Grid) -> Comparison:
    """Compare the numbers that a grid has so far with the published ones."""
    study = grid.study
    measured = {column.name for data_set in study.data_sets for column in data_set.columns}
    columns = tuple(name for name in study.table.columns if name in measured)
    own = [_own_row(grid, variant) for variant in study.variants]
    # With LoRA only, the table compares settings: show the published rows with these settings. Else show all rows.
    all_rows = any(variant.method != "LoRA" for variant in study.variants)
    settings = {variant.setting for variant in study.variants}
    average = study.average if len(columns) > 1 else None
    published = [
        replace(row, cells=_published_cells(row, columns, average))
        for row in study.table.rows
        if all_rows or row.setting in settings
    ]
    if average is not None:
        for row in own:
            if row.cells.keys() == set(columns):
                row.cells[average] = _average(list(row.cells.values()))
        columns += (average,)
    differences = [
        difference
        for lora in own
        if lora.variant.key == "lora"
        for other in own
        if other.variant.method != "LoRA"
        for column in columns
        if column in lora.cells and column in other.cells
        if (difference := _difference(grid, lora, other, column, published)) is not None
    ]
    return Comparison(
        grid=grid,
        columns=columns,
        published=tuple(published),
        own=tuple(own),
        differences=tuple(differences),
    )


def _published_cells(
    row: PublishedRow, columns: Sequence[str], average: str | None
) -> dict[str, Cell]:
    """Return the cells of these columns, and their average: as printed if the paper averages the same columns."""
    cells = {name: row.cells[name] for name in columns}
    if average is not None:
        value = statistics.fmean(cell.value for cell in cells.values())
        is_printed = row.cells.keys() == {*columns, average}
        cells[average] = (
            row.cells[average] if is_printed else Cell(value=value, text=f"{value:.1f}")
        )
    return cells


def _own_row(grid: Grid, variant: Variant) -> OwnRow:
    by_data_set = {d.key: grid.setup.counts.get(d.key, {}) for d in grid.study.data_sets}
    # A log may have a method on a part of its data sets.
    counts = {key: by[variant.key] for key, by in by_data_set.items() if variant.key in by}
    centre = statistics.median if grid.study.table.statistic == "median" else statistics.fmean
    fitting = [count for count in counts.values() if not count.left_out]
    cells: dict[str, Measured] = {}
    for data_set in grid.study.data_sets:
        if data_set.key not in counts or counts[data_set.key].left_out:
            continue
        records = grid.records(data_set, variant)
        for column in data_set.columns:
            values = {
                record.seed: score * column.scale
                for record in records
                if (score := record.score(column.score)) is not None
            }
            if values:
                cells[column.name] = Measured(
                    value=centre(values.values()),
                    mean=statistics.fmean(values.values()),
                    spread=statistics.stdev(values.values()) if len(values) > 1 else None,
                    seeds=values,
                )
    return OwnRow(
        variant=variant,
        trained=fitting[0].trained if fitting else None,
        left_out="" if fitting else next((c.left_out for c in counts.values()), ""),
        cells=cells,
    )


def _average(cells: Sequence[Measured]) -> Measured:
    """Return the mean of the displayed numbers over the columns.

    Its spread is that of a mean of independent numbers: runs with one seed on two data sets differ like others.
    """
    value = statistics.fmean(cell.value for cell in cells)
    mean = statistics.fmean(cell.mean for cell in cells)
    spreads = [cell.spread for cell in cells if cell.spread is not None]
    spread = math.hypot(*spreads) / len(cells) if len(spreads) == len(cells) else None
    return Measured(value=value, mean=mean, spread=spread, seeds={})


def _difference(
    grid: Grid, lora: OwnRow, other: OwnRow, column: str, published: Sequence[PublishedRow]
) -> Difference | None:
    sign = -1 if column in grid.study.table.lower_is_better else 1
    ours, theirs = lora.cells[column].seeds, other.cells[column].seeds
    pairs = [sign * (ours[seed] - theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]
    if pairs:
        value, interval = statistics.fmean(pairs), _interval(pairs)
    elif column == grid.study.average:
        value, interval = sign * (lora.cells[column].mean - other.cells[column].mean), None
    else:
        return None
    verdict: Verdict = "open"
    if interval is not None:
        verdict = "ahead" if interval[0] > 0 else "behind" if interval[1] < 0 else "undecided"
    return Difference(
        column=column,
        other=other.variant.key,
        value=value,
        interval=interval,
        over_examples=_over_examples(grid, lora.variant, other.variant, column, sign),
        verdict=verdict,
        published=_published_difference(published, other.variant, column, sign),
    )


def _over_examples(
    grid: Grid, lora: Variant, other: Variant, name: str, sign: int
) -> tuple[float, float] | None:
    """Return the interval over the choice of the examples, where it can be computed.

    None for one example, and where all examples add the same difference other than zero: its width would be zero, as
    in `_interval`.
    """
    cells = [(d, column) for d in grid.study.data_sets for column in d.columns]
    found = [(d, column) for d, column in cells if column.name == name and column.sums is not None]
    if not found:
        return None
    ((data_set, column),) = found
    assert column.sums is not None
    score, sums = column.score, column.sums
    ours, theirs = (
        {r.seed: r for r in grid.records(data_set, variant)} for variant in (lora, other)
    )
    pairs = [(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]
    records = [record for pair in pairs for record in pair]
    same_examples = len({record.scored for record in records}) == 1
    if not same_examples or not all(score in record.sums for record in records):
        return None
    summands = [(a.summands(score, sums.size), b.summands(score, sums.size)) for a, b in pairs]
    if len({len(run) for pair in summands for run in pair}) > 1:
        raise RunFolderError(
            f"A record of {data_set.key} is damaged: the runs have scored the same data, but sums.{score} are of other "
            "numbers of examples. Restore the file, or delete it to train this run again."
        )
    ends = interval_over_examples(summands, sums.score)
    low, high = sorted(sign * column.scale * end for end in ends)
    return None if len(summands[0][0]) < 2 or low == high != 0 else (low, high)


def _interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % confidence interval of the mean of normally distributed values.

    None for one value, and for equal values that are not zero. Scores of few examples are often equal, and an interval
    of width zero would call any difference significant.
    """
    if len(values) < 2:
        return None
    from scipy.stats import t

    mean = statistics.fmean(values)
    equal = max(values) - min(values) < ROUNDING
    if equal and abs(mean) > ROUNDING:
        return None
    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def _published_difference(
    rows: Sequence[PublishedRow], variant: Variant, column: str, sign: int
) -> tuple[str, float] | None:
    """Return LoRA minus a method on the paper's first model with both in the same setup, unrestricted if possible.

    Of several sizes of the method it is the variant's.
    """
    for restricted in (False, True):
        for model in dict.fromkeys(row.model for row in rows):
            candidates = [r for r in rows if r.model == model and r.restricted == restricted]
            lora = next((r for r in candidates if r.method == "LoRA"), None)
            others = [r for r in candidates if r.method == variant.method]
            others.sort(key=lambda row: row.parameters != variant.published)
            if lora is not None and others:
                return model, sign * (lora.cells[column].value - others[0].cells[column].value)
    return None
