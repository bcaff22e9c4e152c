"""The figure of a comparison, and the page that a table ends in."""

from __future__ import annotations

from lorakit.paper.comparison import Comparison
from lorakit.paper.report import own_notes, rows, title
from lorakit.reporting import Figure, Page, Section
from lorakit.reporting.charts import Chart
from lorakit.reporting.page import Block, Cell, Code, Prose, Table
from lorakit.reporting.scatter import Point, scatter_chart


def comparison_figure(found: Comparison) -> Figure | None:
    """Score against trained parameters, a panel for each column; ours filled, the paper's hollow.

    None where no run of ours is there yet.
    """
    columns = [name for name in found.columns if any(name in row.cells for row in found.own)]
    if not columns:
        return None
    methods = dict.fromkeys(row.method for row in found.published)
    methods |= dict.fromkeys(row.variant.method for row in found.own)
    caption = (
        f"{title(found)}: scores against trained parameters, filled for {found.grid.config.base.name}, hollow for the "
        "models of the paper. Bars are standard deviations over the seeds."
    )
    charts = tuple(
        _panel(found, name, list(methods), legend=place == 0) for place, name in enumerate(columns)
    )
    return Figure(caption=caption, charts=charts, columns=3, name="scores")


def table_page(found: Comparison) -> Page:
    """The page of a table: published rows and ours, the figure, LoRA against the others, the command."""
    grid = found.grid
    head, body, published = rows(found)
    table: list[list[Cell]] = [[" ".join(row[:2]), *row[2:]] for row in body]
    columns = ("Model and method", *head[2:])
    blocks: list[Block] = [
        Table(caption="Published in the paper.", columns=columns, rows=table[:published]),
        Table(caption="Run here.", columns=columns, rows=table[published:]),
    ]
    if (figure := comparison_figure(found)) is not None:
        blocks.append(figure)
    summary = [f"{grid.study.table.title}: {grid.finished} of {grid.total} runs are done."]
    for verdict, words in (("ahead", "better than"), ("behind", "worse than")):
        others = dict.fromkeys(
            f"{labels[d.other]} on {d.column}"
            for d in found.differences
            if d.verdict == verdict and d.other in (labels := _labels(found))
        )
        if others:
            summary.append(f"LoRA is {words} {', '.join(others)}, by more than the seeds differ.")
    notes = [*own_notes(found), *grid.study.table.notes]
    sections = [
        Section(title="Scores", blocks=blocks),
        Section(title="LoRA against the others", blocks=_differences(found)),
        Section(title="Notes", blocks=[Prose(text=note) for note in notes]),
        Section(
            title="Origin",
            blocks=[Code(text=grid.config.command, label="The command that made it")],
        ),
    ]
    return Page(
        kind="The paper's table",
        title=title(found),
        subtitle=grid.study.table.title,
        summary=summary,
        sections=[section for section in sections if section.blocks],
    )


def _differences(found: Comparison) -> list[Block]:
    labels = _labels(found)
    lines: list[list[Cell]] = []
    for one in found.differences:
        digits = found.digits[one.column]
        paper = None if one.published is None else f"{one.published[1]:+.{digits}f}"
        spread = None if one.spread is None else f"{one.spread:.{digits}f}"
        value = f"{one.value:+.{digits}f}"
        lines.append([labels[one.other], one.column, value, spread, one.verdict, paper])
    if not lines:
        return []
    caption = (
        "LoRA's score minus the other's, positive where LoRA is better; ahead or behind where the difference exceeds "
        "the standard deviation of a difference of two runs. One seed decides nothing: open."
    )
    columns = ("Other", "Column", "Difference", "Deviation", "Verdict", "In the paper")
    return [Table(caption=caption, columns=columns, rows=lines)]


def _labels(found: Comparison) -> dict[str, str]:
    return {row.variant.key: row.variant.label for row in found.own}


def _panel(found: Comparison, name: str, methods: list[str], *, legend: bool) -> Chart:
    points = [
        Point(
            series=row.method,
            x=count,
            y=row.cells[name].value,
            name=f"{row.model}, {row.label} {row.setting}".strip(),
            hollow=True,
        )
        for row in found.published
        if (count := row.parameter_count) is not None
    ]
    points += [
        Point(
            series=row.variant.method,
            x=row.trained,
            y=row.cells[name].value,
            name=f"{found.grid.config.base.name}, {row.variant.label}",
            spread=row.cells[name].spread or 0.0,
        )
        for row in found.own
        if row.trained and name in row.cells
    ]
    return scatter_chart(
        name, points, series=methods, x="trained parameters", y=name, legend=legend
    )
