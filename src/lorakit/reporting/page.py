"""Self-contained HTML pages, built from a few kinds of blocks.

`templates/page.html` renders the blocks. It escapes all names, samples and settings, which are untrusted. The page's
content security policy allows only its own script and no network requests.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from lorakit import storage
from lorakit.errors import RunFolderError
from lorakit.formatting import number
from lorakit.reporting import drawing
from lorakit.reporting.charts import Chart, Figure
from lorakit.reporting.texts import Piece, fold, length, plain, with_special
from lorakit.version import __version__

Cell = str | int | float | None

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True, kw_only=True)
class Prose:
    """A paragraph."""

    text: str


@dataclass(frozen=True, kw_only=True)
class KeyFigure:
    """One important number, in large type."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class KeyFigures:
    """Important numbers in a row."""

    figures: tuple[KeyFigure, ...]


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table whose first column holds the row names."""

    caption: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[Cell]]
    """Numbers are written by `lorakit.formatting.number` and aligned right."""

    def is_numeric(self, column: int) -> bool:
        """Whether all cells of a column are numbers or strings that start with one."""
        cells = [row[column] for row in self.rows if row[column] not in (None, "", "-")]
        return bool(cells) and all(_looks_numeric(cell) for cell in cells)


def reference_label(references: Sequence[str]) -> str:
    """Return the label of an answer that shows the first of the references."""
    return f"Reference, one of {len(references)}" if len(references) > 1 else "Reference"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A prompt and the texts for it. The page folds the middle of long ones."""

    prompt: Sequence[Piece]
    answers: Sequence[tuple[str, Sequence[Piece]]]
    """Labels, such as Reference, and the texts."""


def sample(record: Mapping[str, Any], answers: Sequence[tuple[str, Sequence[Piece]]]) -> Sample:
    """Return the sample of a record, with the special tokens of its prompt and answers in pieces of their own."""
    tokens = record.get("special_tokens", ())
    prompt = plain(str(record.get("prompt")).rstrip("\n"))
    return Sample(
        prompt=with_special(prompt, tokens),
        answers=[(label, with_special(pieces, tokens)) for label, pieces in answers],
    )


@dataclass(frozen=True, kw_only=True)
class Samples:
    """A list of samples, each with its answers side by side."""

    caption: str
    samples: tuple[Sample, ...]


@dataclass(frozen=True, kw_only=True)
class Code:
    """A command or the content of a file."""

    text: str
    label: str
    folded: bool = False
    """Collapse the block on screen; print shows it."""


Block = Prose | KeyFigures | Table | Samples | Code | Figure


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and the blocks below it."""

    title: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        """The id of the section in the page."""
        return re.sub(r"\W+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True, kw_only=True)
class Page:
    """A whole report; a notebook shows it."""

    kind: str
    """Kind of report, such as "Training run"."""
    title: str
    subtitle: str = ""
    summary: Sequence[str] = field(default=(), repr=False)
    """Sentences with the main results."""
    sections: Sequence[Section] = field(default=(), repr=False)
    """The page omits sections without blocks."""

    def __post_init__(self) -> None:
        filled = [section for section in self.sections if section.blocks]
        object.__setattr__(self, "sections", filled)

    def render(self) -> str:
        """Return the page as HTML.

        Raises:
            ConfigurationError: The page has charts, and vl-convert-python is not installed.
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

    def _repr_html_(self) -> str:
        # In a frame, because the page has rules for `body`.
        source = html.escape(self.render())
        return f'<iframe srcdoc="{source}" style="width:100%;height:40em;border:0"></iframe>'

    def write(self, path: str | Path) -> Path:
        """Write the page atomically and return its path.

        Raises:
            ConfigurationError: The page has charts, and vl-convert-python is not installed.
            RunFolderError: The file cannot be written.
        """
        text = self.render()
        with storage.atomic_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        return Path(path)

    def figures(self) -> list[Figure]:
        """Return the figures of all sections."""
        return [block for s in self.sections for block in s.blocks if isinstance(block, Figure)]

    def save_figures(self, folder: str | Path, *, overwrite: bool = False) -> list[Path]:
        """Write every figure to a folder, as PNG and as SVG, and return the paths.

        Args:
            folder: The folder, which may contain other files.
            overwrite: Replace existing files of the same names.

        Raises:
            ConfigurationError: vl-convert-python is not installed.
            RunFolderError: A file cannot be written, or exists and `overwrite` is false; then none is written.
        """
        if Path(folder).exists() and not Path(folder).is_dir():
            raise RunFolderError(f"'{folder}' is a file, expected a folder for the figures.")
        files = {
            Path(folder) / f"{position:02d}-{figure.name or 'figure'}{suffix}": figure
            for position, figure in enumerate(self.figures(), 1)
            for suffix in (".png", ".svg")
        }
        for path in files:
            storage.require_free_file(path, overwrite=overwrite)
        for path, figure in files.items():
            drawing.save(figure, path)
        return list(files)


def cell_text(cell: Cell) -> str:
    """Return the text of a cell of a table."""
    if cell is None:
        return "-"
    return str(cell) if isinstance(cell, (bool, str)) else number(cell)


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
    environment.filters["cell_text"] = cell_text
    environment.filters["fold"] = fold
    environment.filters["length_of"] = lambda pieces: f"{length(pieces):,}"
    environment.filters["kind"] = lambda block: type(block).__name__
    return environment.get_template("page.html")
