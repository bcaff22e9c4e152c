"""HTML pages of the measures, and adapter sections for the pages of runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.analysis import figures
from lorakit.analysis.deltas import families, read
from lorakit.analysis.similarity import adapter_similarity
from lorakit.analysis.spectrum import ENERGY, UNTRAINED, adapter_spectrum
from lorakit.errors import LorakitError
from lorakit.formatting import number_range
from lorakit.reporting import Figure, Page, Section
from lorakit.reporting.page import Block, Cell, Code, Prose, Table


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The result of a measure of `lorakit analyze`, for the console, JSON, the figure and the page."""

    facts: dict[str, Any]
    """Values for JSON."""
    rows: dict[str, dict[str, Any]]
    """For each matrix, its numbers by heading."""
    lines: list[str]
    """Sentences about all matrices."""
    draw: Callable[[], Figure]
    """Returns the figure."""
    what: str = "matrix"
    """Heading of the names of `rows`."""
    caption: str | None = None
    """Heading of the table. With a caption the table follows the lines, with one line per row."""


def measure_page(
    measure: str, about: str, subjects: Sequence[str], findings: Findings, command: str
) -> Page:
    """Return the page of a measure of `lorakit analyze`.

    Args:
        measure: Name of the measure.
        about: Description of the measure in one sentence.
        subjects: Paths of the measured adapters (and texts).
        findings: The results.
        command: Command that reproduces the page.
    """
    caption = findings.caption or f"The numbers of every {findings.what}"
    table = Table(
        caption=f"{caption}.",
        columns=(findings.what, *next(iter(findings.rows.values()), {})),
        rows=[(name, *cells.values()) for name, cells in findings.rows.items()],
    )
    notes: list[Block] = [Prose(text=notice) for notice in findings.facts["notices"]]
    sections = [
        Section(title="Figures", blocks=[findings.draw()]),
        Section(title="Numbers", blocks=[table]),
        Section(title="Notes", blocks=notes),
        Section(title="Origin", blocks=[Code(text=command, label="The command that made it")]),
    ]
    return Page(
        kind=f"Analysis: {measure}",
        title=" and ".join(map(_name, subjects)),
        subtitle=about,
        summary=findings.lines,
        sections=sections,
    )


def _name(subject: str) -> str:
    """Return the last two names of a path: every run names its adapter folder `adapter`."""
    path = Path(subject)
    if not path.name or ".." in path.parts:
        path = path.resolve()
    return "/".join(part for part in path.parts[-2:] if part != path.anchor)


def run_sections(adapter: str | Path) -> list[Section]:
    """Return the spectrum section of a run's page; empty without low-rank factors."""
    stored = read(adapter)
    if not stored.layers:
        return []
    spectra = adapter_spectrum(stored)
    rows: list[tuple[Cell, ...]] = [
        (
            kind,
            len(layers),
            number_range([layer.rank for layer in layers.values()]),
            number_range([layer.norm for layer in layers.values()]),
            number_range([layer.effective_rank for layer in layers.values()]),
            number_range([layer.rank_for(ENERGY) for layer in layers.values()]),
        )
        for kind, layers in families(spectra.layers).items()
    ]
    columns = ("Matrices", "Count", "Rank", "Norm", "Effective rank", f"Rank for {ENERGY:.0%}")
    suggested = spectra.rank_for(ENERGY)
    sentence = UNTRAINED
    if suggested:
        sentence = (
            f"Rank {suggested} for all layers would keep {ENERGY:.0%} of the change's squared norm; the adapter has "
            f"rank {len(spectra.energy)}."
        )
    blocks: list[Block] = [
        Prose(text=sentence),
        figures.spectrum_figure(spectra),
        Table(caption="The change by kind of matrix.", columns=columns, rows=rows),
    ]
    return [Section(title="Spectrum of the adapter", blocks=blocks)]


def comparison_sections(first: str | Path, second: str | Path) -> list[Section]:
    """Return the similarity section of a page that compares two runs; empty without low-rank factors."""
    if not (read(first).layers and read(second).layers):
        return []
    try:
        similarity = adapter_similarity(first, second)
    except LorakitError as error:  # for example, the adapters share no layers
        blocks: list[Block] = [
            Prose(text=f"The directions of the adapters are not compared. {error}")
        ]
    else:
        blocks = [figures.similarity_figure(similarity, side) for side in "AB"]
    return [Section(title="Do the adapters share directions?", blocks=blocks)]
