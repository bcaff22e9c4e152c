"""Where a command prints tables and colours."""

from __future__ import annotations

from rich.console import Console


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would exit with status 1; whoever reads has seen enough, see `main`


def console() -> Console:
    """Return the standard output; where it is no terminal, it has no width of its own."""
    made = _Console(highlight=False)
    return made if made.is_terminal else _Console(highlight=False, width=160)
