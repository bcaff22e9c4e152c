"""`lorakit report`, and the reports that other commands end in."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.configuration import conform
from lorakit.errors import ConfigurationError, LorakitError

if TYPE_CHECKING:
    from lorakit.reporting import Page

COMPARISON = "comparison.html"


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What `lorakit report` shows."""

    runs: tuple[str, ...]
    """Run folders: the page of one, or one page that compares several."""
    output: str | None = None
    """The page; by default report.html in the run's folder, or comparison.html here for several."""
    method: str | None = None
    """A method of your own that the adapters were trained with: path/to/file.py:Class."""
    figures: str | None = None
    """Write every figure of the page into this folder too, as PNG and SVG."""
    overwrite: bool = False
    """Replace an existing output. The run's own report.html is always replaced."""

    def __post_init__(self) -> None:
        conform(self)
        if not self.runs:
            raise ConfigurationError("runs is empty; name a run's folder: lorakit report RUN.")
        if len({Path(run).resolve() for run in self.runs}) < len(self.runs):
            raise ConfigurationError("runs names a folder twice; name each run once.")


def run(argv: Sequence[str]) -> None:
    """Read the runs' folders and write the page."""
    from lorakit import storage
    from lorakit.cli.parsing import parse
    from lorakit.methods.registry import use_method
    from lorakit.reporting.drawing import require_drawing
    from lorakit.training.run_folder import REPORT

    config = parse(
        ReportConfig,
        "report",
        "Write the page of a run, finished or not, or one that compares runs. "
        "Usage: lorakit report RUN [RUN ...].",
        _named(argv),
    )
    if config.method is not None:
        use_method(config.method)
    require_drawing()
    one = len(config.runs) == 1
    own = one and config.output is None
    target = Path(config.output or (Path(config.runs[0]) / REPORT if one else COMPARISON))
    page = page_of(config.runs)
    storage.require_free_file(target, overwrite=own or config.overwrite)
    print(f"report   {page.write(target)}")
    if config.figures is not None:
        for path in page.save_figures(config.figures):
            print(f"figure   {path}")


def page_of(runs: Sequence[str | Path]) -> Page:
    """The page of one run or of several.

    Raises:
        RunFolderError: A folder is not that of a run, or is damaged.
    """
    from lorakit.analysis.report import comparison_sections, run_sections
    from lorakit.reporting.comparison import comparison_page
    from lorakit.reporting.run_record import read_run
    from lorakit.reporting.run_report import run_page
    from lorakit.training.run_folder import ADAPTER

    records = [read_run(folder) for folder in runs]
    # The adapter after the last step; a run that is not finished may have none.
    adapters = [r.folder / ADAPTER for r in records if r.result is not None]
    if len(records) == 1:
        analysis = run_sections(adapters[0]) if adapters else []
        return run_page(records[0], analysis=analysis)
    both = len(records) == len(adapters) == 2
    return comparison_page(records, analysis=comparison_sections(*adapters) if both else [])


def write_run_report(folder: Path, *, predicted: Mapping[str, float] | None = None) -> str:
    """Write a finished run's report into its folder; return its path, or why there is none.

    Args:
        folder: The run's folder.
        predicted: What was expected of the run, by the keys of `lorakit.reporting.run_report.PREDICTED`; it is kept
            beside the run, for reports to come.
    """
    from lorakit import storage
    from lorakit.training.run_folder import PREDICTION, REPORT

    def write() -> Path:
        if predicted is not None:
            with storage.atomic_file(folder / PREDICTION) as temporary:
                storage.write_record(temporary, dict(predicted))
        return page_of([folder]).write(folder / REPORT)

    return written(write)


def written(write: Callable[[], Path]) -> str:
    """Write a report after the work it tells of; return its path, or why there is none.

    The work is done and kept: what hinders its report is said, and is no error of the command.
    """
    try:
        return str(write())
    except (LorakitError, OSError) as error:
        return f"none. {error}"


def _named(argv: Sequence[str]) -> list[str]:
    """Give the leading values the option's name, as one list."""
    rest = list(argv)
    runs = []
    while rest and not rest[0].startswith("-"):
        runs.append(rest.pop(0))
    return [*(["--runs", json.dumps(runs)] if runs else []), *rest]
