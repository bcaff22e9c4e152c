"""Run a table of the paper: the grid, and after every run the page, the JSON and the figure."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from lorakit import storage
from lorakit.paper.comparison import Comparison, compare
from lorakit.paper.figures import comparison_figure, table_page
from lorakit.paper.grid import Grid, Say, open_grid
from lorakit.paper.paper_config import PaperConfig
from lorakit.paper.report import as_dict, markdown
from lorakit.paper.runs import Measure
from lorakit.reporting import drawing


@dataclass(frozen=True, kw_only=True)
class TableResult:
    """A table that was run."""

    comparison: Comparison
    page: Path
    data: Path
    figure: Path | None
    report: Path | None
    """The page to look at; None until the runs are done."""


def run_table(
    config: PaperConfig, say: Say = print, *, amplification: Measure | None = None
) -> TableResult:
    """Make the runs that are missing, and write the table as far as it goes after each of them.

    An interrupted call loses no finished run: the same call goes on where it was, within a run too.

    Args:
        config: The table, the model, and how much is run.
        say: Told what is going on, a line at a time.
        amplification: What table 7 measures of an adapter on its base: the numbers of a row by column.

    Raises:
        LorakitError: Something the user can mend: settings, data, base, folder.
    """
    drawing.require_drawing()  # now rather than after hours of runs
    with open_grid(config, say, amplification) as grid:
        grid.run(after_each=lambda: _write(grid))
        return _write(grid, figure=True)


def _write(grid: Grid, *, figure: bool = False) -> TableResult:
    found = compare(grid)
    folder, name = grid.config.folder, grid.config.table
    page, data, plot = (folder / f"{name}{suffix}" for suffix in (".md", ".json", ".png"))
    drawn = figure and _draw(found, plot)
    text = markdown(found)
    if drawn:
        text = text.replace(
            "\n## ", f"\n![Scores against trained parameters]({plot.name})\n\n## ", 1
        )
    with storage.atomic_file(page) as temporary:
        temporary.write_text(text, encoding="utf-8")
    with storage.atomic_file(data) as temporary:
        record = json.dumps(as_dict(found), indent=1, ensure_ascii=False)
        temporary.write_text(record + "\n", encoding="utf-8")
    report = table_page(found).write(folder / f"{name}.html") if figure else None
    return TableResult(
        comparison=found, page=page, data=data, figure=plot if drawn else None, report=report
    )


def _draw(found: Comparison, path: Path) -> bool:
    figure = comparison_figure(found)
    if figure is not None:
        drawing.save(figure, path)
    return figure is not None
