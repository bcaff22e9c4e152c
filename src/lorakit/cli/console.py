"""The console that commands print tables and colours to."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lorakit.formatting import number, visible


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would exit with status 1; `main` exits with 0

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text, keep="\n\t"), **options)


def console() -> Console:
    """Return a console on standard output, 160 columns wide where that is not a terminal."""
    output = _Console(highlight=False)
    return output if output.is_terminal else _Console(highlight=False, width=160)


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> Table:
    """Return a table of literal text. The first `left` columns are left-aligned, the others right-aligned."""
    result = Table(box=None, pad_edge=False)
    for i, heading in enumerate(headings):
        result.add_column(
            literal(heading), justify="left" if i < left else "right", overflow="fold"
        )
    for row in rows:
        result.add_row(*map(literal, row))
    return result


def literal(text: str) -> str:
    """Return a cell or part of a line that is printed as it is: without markup or line breaks of its own."""
    return escape(visible(text))


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    print(visible(json.dumps(value, indent=2, ensure_ascii=False), keep="\n"))


def print_scores(columns: Mapping[str, Mapping[str, float]]) -> None:
    """Print a table with one line per score and one column per mapping of scores."""
    names = dict.fromkeys(name for scores in columns.values() for name in scores)
    rows = [
        (name, *(number(of[name]) if name in of else "-" for of in columns.values()))
        for name in names
    ]
    console().print(table(("score", *columns), rows))


class StatusLine:
    """Show what a command does on standard error, in a line that disappears; nothing where that is not a terminal."""

    def __call__(self, what: str) -> None:
        """Replace the text of the line, such as "reading the data"."""
        self._write(f"{what} ...")

    def __enter__(self) -> StatusLine:
        return self

    def __exit__(self, *_: object) -> None:
        self._write("")

    def _write(self, text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)


class ProgressLine:
    """Show the progress of a long command on standard error: rewrite a line on a terminal, else print one at times."""

    INTERVAL = 10.0
    """Seconds between lines that are not on a terminal, so that a log file stays small."""

    def __init__(self) -> None:
        self._shown = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show what is done, such as "prompts answered", how many are done, and their total."""
        text = f"{done:,} of {total:,} {what}"
        if sys.stderr.isatty():
            print(f"\r{text}\033[K", end="" if done < total else "\n", file=sys.stderr, flush=True)
        elif time.monotonic() - self._shown >= self.INTERVAL or done == total:
            self._shown = time.monotonic()
            print(text, file=sys.stderr, flush=True)
