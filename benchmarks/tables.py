"""Write the pages of the paper's tables from the logs of their runs.

    python -m benchmarks.tables

Each folder of docs/results/runs is the log of a table (`lorakit paper --log`). Its page, docs/results/FOLDER.md, holds
what follows from the log and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from lorakit.paper.comparison import compare
from lorakit.paper.grid import recorded_grid
from lorakit.paper.log import recorded_config
from lorakit.paper.paper_config import PaperDataConfig
from lorakit.paper.report import markdown

RESULTS = Path(__file__).parents[1] / "docs" / "results"


def pages() -> Iterator[tuple[Path, str]]:
    """Yield the path and the text of each page; a log without a scored run has none."""
    for log in sorted(path.parent for path in (RESULTS / "runs").glob("*/grid.json")):
        config = replace(recorded_config(log), data=PaperDataConfig(root="DATA"))
        comparison = compare(recorded_grid(config))
        if any(row.cells for row in comparison.own):
            yield RESULTS / f"{log.name}.md", markdown(comparison)


if __name__ == "__main__":
    for path, text in pages():
        path.write_text(text, encoding="utf-8")
