"""A page: one HTML file that needs nothing beside it, made of a few kinds of blocks.

The blocks are data; `templates/page.html` says how each looks. Names, samples and settings come from outside: the
template escapes them all, and the page's policy lets no script run but its own and nothing be fetched.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from lorakit import storage
from lorakit.errors import RunFolderError
from lorakit.reporting import drawing
from lorakit.reporting.charts import Chart, Figure
from lorakit.reporting.differences import Piece
from lorakit.version import __version__

Cell = str | int | float | None

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True, kw_only=True)
class Prose:
    """A paragraph."""

    text: str


@dataclass(frozen=True, kw_only=True)
class KeyFigure:
    """One number that matters, large."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class KeyFigures:
    """Numbers that matter, side by side."""

    figures: tuple[KeyFigure, ...]


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table, whose first column names the rows."""

    caption: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[Cell]]
    """Numbers are shown with four digits and set to the right."""

    def is_numeric(self, column: int) -> bool:
        """Whether a column holds numbers, or texts that begin as numbers do."""
        cells = [row[column] for row in self.rows if row[column] not in (None, "", "-")]
        return bool(cells) and all(_looks_numeric(cell) for cell in cells)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One of the texts that a sample compares."""

    label: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A prompt, and what came of it."""

    prompt: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Samples under each other, their answers side by side."""

    caption: str
    samples: tuple[Sample, ...]


@dataclass(frozen=True, kw_only=True)
class Code:
    """A command or a file, to be copied."""

    text: str
    label: str
    folded: bool = False
    """Shown on demand, and in print."""


Block = Prose | KeyFigures | Table | Samples | Code | Figure


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        """The name of its place in the page."""
        return re.sub(r"\W+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True, kw_only=True)
class Page:
    """A whole report."""

    kind: str
    """What is reported, such as Training run."""
    title: str
    subtitle: str = ""
    summary: Sequence[str] = ()
    """What came out, in sentences."""
    sections: Sequence[Section] = field(default_factory=tuple)

    def render(self) -> str:
        """The page as HTML.

        Raises:
            ConfigurationError: It has charts, and what draws them is not installed.
        """
        numbers = count(1)

        def draw(chart: Chart) -> Markup:
            return Markup(drawing.inline_svg(chart, next(numbers)))

        style, script = _asset("style.css"), _asset("hover.js")
        return _template().render(
            page=self,
            draw=draw,
            style=Markup(style + _chart_colours()),
            script=Markup(script),
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            version=__version__,
        )

    def write(self, path: str | Path) -> Path:
        """Write the page, whole or not at all, and return its path.

        Raises:
            ConfigurationError: It has charts, and what draws them is not installed.
            RunFolderError: The file cannot be written.
        """
        text = self.render()
        with storage.atomic_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        return Path(path)

    def figures(self) -> list[Figure]:
        """The figures of all sections."""
        return [block for s in self.sections for block in s.blocks if isinstance(block, Figure)]

    def save_figures(self, folder: str | Path) -> list[Path]:
        """Write every figure as PNG and as SVG into a folder, and return the paths.

        Raises:
            ConfigurationError: What draws them is not installed.
            RunFolderError: A file cannot be written.
        """
        if Path(folder).exists() and not Path(folder).is_dir():
            raise RunFolderError(f"'{folder}' is a file; name a folder for the figures.")
        written = []
        for number, figure in enumerate(self.figures(), 1):
            for suffix in (".png", ".svg"):
                path = Path(folder) / f"{number:02d}-{figure.name or 'figure'}{suffix}"
                drawing.save(figure, path)
                written.append(path)
        return written


def number(value: Cell) -> str:
    """A cell as it is shown: whole numbers in full, others with four digits."""
    if value is None:
        return "-"
    if isinstance(value, (bool, str)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:#.4g}".rstrip(".") if 1e-3 <= abs(value) < 1e4 else f"{value:.4g}"


def _looks_numeric(cell: Any) -> bool:
    if isinstance(cell, (int, float)):
        return not isinstance(cell, bool)
    return bool(re.match(r"[-+\u2212]?[\d.,]+", str(cell))) and len(str(cell)) < 24


def _chart_colours() -> str:
    rules = (
        f'svg.chart [{attribute}="{colour}"]{{{attribute}:var({variable})}}\n'
        for colour, variable in drawing.VARIABLES.items()
        for attribute in ("fill", "stroke")
    )
    return "\n" + "".join(rules)


@cache
def _asset(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    environment.filters["kind"] = lambda block: type(block).__name__
    return environment.get_template("page.html")
