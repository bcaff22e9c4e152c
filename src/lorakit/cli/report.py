"""`lorakit report`, and the reports that other commands write at their end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.cli.parsing import parse
from lorakit.compute.adapted_config import AdapterFileConfig
from lorakit.configuration import LocalPath
from lorakit.errors import ConfigurationError, require_suffix
from lorakit.file_names import ADAPTER, PREDICTION, REPORT

if TYPE_CHECKING:
    from lorakit.reporting import Page


@dataclass(frozen=True, kw_only=True)
class ReportConfig(AdapterFileConfig):
    """Options of `lorakit report`."""

    runs: tuple[LocalPath, ...]
    """Run folders. Several runs are compared in one report."""
    output: LocalPath | None = None
    """The report. Default: report.html in the run folder, or ./comparison.html for several runs."""
    figures: LocalPath | None = None
    """Also write every figure to this folder, as PNG and SVG."""
    overwrite: bool = False
    """Replace an existing output and figures. Always replaces report.html in the run folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.runs:
            raise ConfigurationError("runs is empty; give a run folder: lorakit report RUN.")
        if len({Path(run).resolve() for run in self.runs}) < len(self.runs):
            raise ConfigurationError("runs names a folder twice; give each run folder once.")
        require_suffix("output", self.output, ".html")


CONFIGS = (ReportConfig,)


def run(argv: Sequence[str]) -> None:
    """Read the run folders and write the report."""
    config = parse(
        ReportConfig,
        "report",
        "Write the HTML report of a run, finished or not, or compare several runs.",
        argv,
        "runs",
    )
    from lorakit import storage
    from lorakit.reporting.drawing import require_drawing

    require_drawing()
    one = len(config.runs) == 1
    own = one and config.output is None
    target = Path(config.output or (Path(config.runs[0]) / REPORT if one else "comparison.html"))
    page = page_of(config.runs)
    storage.require_free_file(target, overwrite=own or config.overwrite)
    figures = []
    if config.figures is not None:  # first, so that a refused figure leaves the old page
        figures = page.save_figures(config.figures, overwrite=config.overwrite)
    print(f"report   {page.write(target)}")
    for path in figures:
        print(f"figure   {path}")


def page_of(runs: Sequence[str | Path]) -> Page:
    """Return the report of one run, or the comparison of several. Raise a RunFolderError for a damaged folder."""
    from lorakit.analysis.report import comparison_sections, run_sections
    from lorakit.reporting.comparison import comparison_page
    from lorakit.reporting.run_record import read_run
    from lorakit.reporting.run_report import run_page

    records = [read_run(folder) for folder in runs]
    # The adapter after the last step. Only finished runs have one, until the user deletes it.
    adapters = [r.folder / ADAPTER for r in records if r.result and r.adapter_bytes]
    if len(records) == 1:
        analysis = run_sections(adapters[0]) if adapters else []
        return run_page(records[0], analysis=analysis)
    both = len(records) == len(adapters) == 2
    return comparison_page(records, analysis=comparison_sections(*adapters) if both else [])


def write_run_report(folder: Path, *, predicted: Mapping[str, float] | None = None) -> str:
    """Write the report of a finished run to its folder; return its path, or the reason for its absence.

    Saves `predicted`, by the keys of `lorakit.reporting.run_report.PREDICTED`, in the folder for later reports.
    """
    from lorakit import storage

    def write() -> Path:
        if predicted is not None:
            with storage.atomic_file(folder / PREDICTION) as temporary:
                storage.write_record(temporary, dict(predicted))
        return page_of([folder]).write(folder / REPORT)

    return try_to_write(write)


def try_to_write(write: Callable[[], Path]) -> str:
    """Write a report; return its path, or the reason for its absence.

    A failed report is not an error of the command, because the results of its work are already saved.
    """
    try:
        return str(write())
    except Exception as error:
        return f"none. {str(error) or type(error).__name__}"  # MemoryError has no text
