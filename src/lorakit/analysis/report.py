"""Pages of the measures, and their sections in the pages of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lorakit.analysis import figures
from lorakit.analysis.deltas import family, read
from lorakit.analysis.similarity import adapter_similarity
from lorakit.analysis.spectrum import ENERGY, UNTRAINED, adapter_spectrum
from lorakit.errors import LorakitError
from lorakit.reporting import Figure, Page, Section
from lorakit.reporting.page import Block, Cell, Code, Prose, Table


def measure_page(
    measure: str,
    *,
    about: str,
    subjects: Sequence[str],
    lines: Sequence[str],
    rows: Mapping[str, Mapping[str, Cell]],
    what: str,
    drawn: Sequence[Figure],
    notices: Sequence[str],
    command: str,
    heading: str | None = None,
) -> Page:
    """The page of a measure of `lorakit analyze`.

    Args:
        measure: Its name.
        about: What it tells, in a sentence.
        subjects: The adapters (and texts) it was taken of.
        lines: What was found, in sentences.
        rows: The numbers by matrix, or by whatever `what` says.
        what: What a row is of.
        drawn: The figures.
        notices: What the reader should know.
        command: The command that made it.
        heading: What the table shows; by default the numbers of every row.
    """
    columns = (what, *next(iter(rows.values()), {}))
    table = Table(
        caption=heading or f"The numbers of every {what}.",
        columns=columns,
        rows=[(name, *cells.values()) for name, cells in rows.items()],
    )
    sections = [
        Section(title="Figures", blocks=drawn),
        Section(title="Numbers", blocks=[table]),
        Section(title="Notes", blocks=[Prose(text=notice) for notice in notices]),
        Section(title="Origin", blocks=[Code(text=command, label="The command that made it")]),
    ]
    return Page(
        kind=f"Analysis: {measure}",
        title=" and ".join(_name(subject) for subject in subjects),
        subtitle=about,
        summary=lines,
        sections=[section for section in sections if section.blocks],
    )


def run_sections(adapter: str | Path) -> list[Section]:
    """What the page of a run shows of its adapter: its spectrum, where it consists of thin matrices."""
    stored = read(adapter)
    if not stored.layers:
        return []
    found = adapter_spectrum(stored)
    kinds: dict[str, list[str]] = {}
    for name in found.layers:
        kinds.setdefault(family(name), []).append(name)
    rows: list[tuple[Cell, ...]] = []
    for kind, names in kinds.items():
        layers = [found.layers[name] for name in names]
        rows.append(
            (
                kind,
                len(layers),
                _range([len(layer.singular_values) for layer in layers]),
                _range([layer.norm for layer in layers]),
                _range([layer.effective_rank for layer in layers]),
                _range([layer.rank_for(ENERGY) for layer in layers]),
            )
        )
    columns = ("Matrices", "Count", "Rank", "Norm", "Effective rank", f"Rank for {ENERGY:.0%}")
    suggested = found.rank_for(ENERGY)
    sentence = UNTRAINED
    if suggested:
        sentence = (
            f"Rank {suggested} for all matrices would keep {ENERGY:.0%} of the change's squared norm; the adapter has "
            f"rank {max(len(layer.singular_values) for layer in found.layers.values())}."
        )
    blocks: list[Block] = [
        Prose(text=sentence),
        figures.spectrum_figure(found),
        Table(caption="The change by kind of matrix.", columns=columns, rows=rows),
    ]
    return [Section(title="What the adapter holds", blocks=blocks)]


def comparison_sections(first: str | Path, second: str | Path) -> list[Section]:
    """What a page that compares two runs shows of their adapters: how alike their directions are."""
    if not (read(first).layers and read(second).layers):
        return []
    try:
        found = adapter_similarity(first, second)
    except LorakitError as error:  # such as adapters of other layers: the page says it
        blocks: list[Block] = [
            Prose(text=f"The directions of the adapters are not compared. {error}")
        ]
    else:
        blocks = [figures.similarity_figure(found, side) for side in "AB"]
    return [Section(title="Do the adapters share directions?", blocks=blocks)]


def _range(numbers: Sequence[float]) -> str:
    low, high = (
        f"{number:,}" if isinstance(number, int) else f"{number:.3g}"
        for number in (min(numbers), max(numbers))
    )
    return low if low == high else f"{low} to {high}"


def _name(subject: str) -> str:
    """The last two parts of a path: every run's adapter lies in a folder `adapter`."""
    return "/".join(Path(subject).parts[-2:])
