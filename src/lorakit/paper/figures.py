"""The figure and the HTML page of a comparison."""

from __future__ import annotations

from lorakit.paper.comparison import Comparison
from lorakit.paper.notes import own_notes
from lorakit.paper.report import rows, title
from lorakit.reporting import Figure, Page, Section
from lorakit.reporting.charts import Chart
from lorakit.reporting.page import Block, Cell, Code, Prose, Table
from lorakit.reporting.scatter import Point, scatter_chart


def comparison_figure(comparison: Comparison) -> Figure | None:
    """Plot scores against trained parameters, one panel per column: measured filled, published hollow.

    Return None without measured numbers.
    """
    columns = [n for n in comparison.columns if any(n in row.cells for row in comparison.own)]
    if not columns:
        return None
    methods = dict.fromkeys(row.method for row in comparison.published)
    methods |= dict.fromkeys(row.variant.method for row in comparison.own)
    caption = (
        f"{title(comparison)}: scores against trained parameters, filled for {comparison.grid.config.base.name}, "
        "hollow for the models of the paper. Bars are standard deviations over the seeds."
    )
    charts = tuple(
        _panel(comparison, name, list(methods), legend=i == 0) for i, name in enumerate(columns)
    )
    return Figure(caption=caption, charts=charts, columns=3, name="scores")


def table_page(comparison: Comparison) -> Page:
    """Return the page of a table: published and measured rows, the figure, LoRA's differences and the command."""
    grid = comparison.grid
    head, *parts = rows(comparison)
    published, measured = ([[" ".join(row[:2]), *row[2:]] for row in part] for part in parts)
    columns = ("Model and method", *head[2:])
    blocks: list[Block] = [
        Table(caption="Published in the paper.", columns=columns, rows=published),
        Table(caption="Measured here.", columns=columns, rows=measured),
    ]
    if (figure := comparison_figure(comparison)) is not None:
        blocks.append(figure)
    summary = [f"{grid.study.table.title}: {grid.finished} of {grid.total} runs are finished."]
    for verdict, words in (("ahead", "better than"), ("behind", "worse than")):
        others = [
            f"{comparison.labels[d.other]} on {d.column}"
            for d in comparison.differences
            if d.verdict == verdict
        ]
        if others:
            summary.append(
                f"LoRA is {words} {', '.join(others)}: the 95 % interval of the difference excludes zero."
            )
    if len(summary) > 1 and comparison.chance_note:
        summary.append(comparison.chance_note)
    notes = [*own_notes(comparison), *comparison.published_notes]
    command = Code(text=grid.config.command, label="Command that created this page")
    sections = [
        Section(title="Scores", blocks=blocks),
        Section(title="LoRA against the other methods", blocks=_differences(comparison)),
        Section(title="Notes", blocks=[Prose(text=note) for note in notes]),
        Section(title="Origin", blocks=[command]),
    ]
    return Page(
        kind="Table of the paper",
        title=title(comparison),
        subtitle=grid.study.table.title,
        summary=summary,
        sections=sections,
    )


def _differences(comparison: Comparison) -> list[Block]:
    lines: list[list[Cell]] = []
    for d in comparison.differences:
        digits = comparison.digits[d.column]
        paper = None if d.published is None else f"{d.published[1]:+.{digits}f}"
        seeds, examples = (
            ends and " to ".join(f"{end:+.{digits}f}" for end in ends)
            for ends in (d.interval, d.over_examples)
        )
        value = f"{d.value:+.{digits}f}"
        name = comparison.labels[d.other]
        lines.append([name, d.column, value, seeds, d.verdict, examples, paper])
    if not lines:
        return []
    caption = (
        "LoRA's score minus the other method's, the mean over runs with the same seed; positive if LoRA is better. The "
        "verdict is ahead or behind if the 95 % confidence interval over the seeds excludes zero, else undecided. It "
        "is open with one seed, for an average, or if all differences are equal and not zero. The interval over the "
        "examples is of the same runs on resampled examples."
    )
    columns = (
        *("Other", "Column", "Difference", "95 % interval over seeds", "Verdict"),
        *("95 % interval over examples", "In the paper"),
    )
    return [Table(caption=caption, columns=columns, rows=lines)]


def _panel(comparison: Comparison, name: str, methods: list[str], *, legend: bool) -> Chart:
    points = [
        Point(
            series=row.method,
            x=count,
            y=row.cells[name].value,
            name=f"{row.model}, {row.label} {row.setting}".strip(),
            spread=row.cells[name].spread or 0.0,
            hollow=True,
        )
        for row in comparison.published
        if (count := row.parameter_count) is not None
    ]
    points += [
        Point(
            series=row.variant.method,
            x=row.trained,
            y=row.cells[name].value,
            name=f"{comparison.grid.config.base.name}, {row.variant.label}",
            spread=row.cells[name].spread or 0.0,
        )
        for row in comparison.own
        if row.trained and name in row.cells
    ]
    return scatter_chart(
        name, points, series=methods, x="trained parameters", y=name, legend=legend
    )
