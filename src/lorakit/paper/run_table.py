"""Run a table of the paper: execute the grid, and write the page, the JSON and the figure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lorakit.paper.comparison import Comparison, compare
from lorakit.paper.figures import comparison_figure, table_page
from lorakit.paper.grid import open_grid
from lorakit.paper.paper_config import PaperConfig
from lorakit.paper.report import as_dict, markdown, write
from lorakit.paper.runs import Measure, Say
from lorakit.reporting import drawing


@dataclass(frozen=True, kw_only=True)
class TableResult:
    """A reproduced table, and the files that hold it."""

    comparison: Comparison
    page: Path
    """Markdown."""
    data: Path
    """JSON."""
    figure: Path | None
    """PNG; None if there is nothing to plot."""
    report: Path
    """HTML."""


def run_table(
    config: PaperConfig, say: Say = print, *, amplification: Measure | None = None
) -> TableResult:
    """Execute the unfinished runs of a table, and update its files after each of them.

    After an interruption the same call resumes, also within a run. It repeats no finished run.

    Args:
        config: The table, the model and the size of the grid.
        say: Receives progress, one line per call.
        amplification: Returns the numbers of a row of table 7 by column, from an adapter folder and its base. Table 7
            needs it: pass `lorakit.analysis.table7_row`.

    Raises:
        LorakitError: Invalid settings, data, base or folder.
    """
    drawing.require_drawing()  # fail now, not after hours of runs
    with open_grid(config, say, amplification) as grid:
        grid.run(lambda: _write_tables(compare(grid)), say)
        comparison = compare(grid)
        plot = None
        if (figure := comparison_figure(comparison)) is not None:
            plot = config.folder / f"{config.table}.png"
            drawing.save(figure, plot)
        page, data = _write_tables(comparison, plot)
        return TableResult(
            comparison=comparison,
            page=page,
            data=data,
            figure=plot,
            report=table_page(comparison).write(config.folder / f"{config.table}.html"),
        )


def _write_tables(comparison: Comparison, plot: Path | None = None) -> tuple[Path, Path]:
    """Write the Markdown page, with a link to the plot, and the JSON file; return their paths."""
    text = markdown(comparison)
    if plot is not None:
        image = f"![Scores against trained parameters]({plot.name})"
        text = text.replace("\n## ", f"\n{image}\n\n## ", 1)
    return write(comparison.grid.config, text, as_dict(comparison))
