"""The console that commands print tables and colours to."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would exit with status 1; `main` exits with 0


def console() -> Console:
    """Return a console on standard output, 160 columns wide where that is not a terminal."""
    output = _Console(highlight=False)
    return output if output.is_terminal else _Console(highlight=False, width=160)


def print_scores(scores: Mapping[str, float]) -> None:
    """Print one line per score."""
    table = Table(box=None, pad_edge=False)
    table.add_column("score")
    table.add_column("value", justify="right")
    for name, value in scores.items():
        table.add_row(name, f"{value:.4f}")
    console().print(table)
