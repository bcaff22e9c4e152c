"""The console that commands print tables and colours to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would exit with status 1; `main` exits with 0


def console() -> Console:
    """Return a console on standard output, 160 columns wide where that is not a terminal."""
    output = _Console(highlight=False)
    return output if output.is_terminal else _Console(highlight=False, width=160)


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> Table:
    """Return a table of literal text. The first `left` columns are left-aligned, the others right-aligned."""
    result = Table(box=None, pad_edge=False)
    for i, heading in enumerate(headings):
        result.add_column(escape(heading), justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        result.add_row(*map(escape, row))
    return result


def print_scores(scores: Mapping[str, float]) -> None:
    """Print one line per score."""
    rows = [(name, f"{value:.4f}") for name, value in scores.items()]
    console().print(table(("score", "value"), rows))
