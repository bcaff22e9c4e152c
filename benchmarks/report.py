"""Where figures go: JSON for programs, Markdown for pages, the same tables on the console."""

from __future__ import annotations

import datetime
import io
import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from lorakit.training.environment import environment

RESULTS = Path(__file__).parent / "results"
"""Where results go, unless `put_results_into` says otherwise."""
PACKAGES = ("torch", "transformers", "peft", "loralib", "accelerate")

console = Console(highlight=False)
if not console.is_terminal:
    console = Console(highlight=False, width=190)  # a log has room for whole tables


class Section(NamedTuple):
    """A table with its title, and what a reader has to know beside it."""

    title: str
    table: Table
    note: str = ""


def machine() -> dict[str, Any]:
    """Describe the machine and the software that the figures are of."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = environment(device)
    return {
        "date": datetime.date.today().isoformat(),
        "processor": found["processor"],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": found["device"],
        "instructions": _instructions(),
        "platform": platform.platform(),
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in PACKAGES},
        },
    }


def _instructions() -> str:
    """The widest vectors, and AMX where there is a unit for the products of matrices."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older releases do not tell
    matrices = ["AMX"] if capabilities.get("amx_tile") else []
    return " and ".join([torch.backends.cpu.get_cpu_capability(), *matrices])


def in_words(found: dict[str, Any]) -> str:
    """Describe a machine in a sentence."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    where = "no GPU" if found["device"] == "cpu" else found["device"]
    return (
        f"{found['date']}: {found['processor']}, {found['cores']} cores, {found['threads']} threads, "
        f"{found['instructions']}, {where}; {versions}."
    )


def put_results_into(path: Path) -> None:
    """Put the results of this process into another folder: those of another machine, beside those that pages quote."""
    global RESULTS
    RESULTS = path.resolve()


def folder(quick: bool) -> Path:
    """Where results go: a quick run's do not replace those that pages quote."""
    path = RESULTS / "quick" if quick else RESULTS
    path.mkdir(parents=True, exist_ok=True)
    return path


def work(quick: bool) -> Path:
    """Where the figures of single runs are kept, for an interrupted benchmark to go on from."""
    return RESULTS / "work" / ("quick" if quick else "full")


def write(
    part: str, record: dict[str, Any], sections: Sequence[tuple[Any, ...]], quick: bool
) -> None:
    """Write a part's figures as JSON and its tables as Markdown.

    Args:
        part: Name of the files.
        record: All figures.
        sections: A :class:`Section` for each table.
        quick: Whether they are those of a quick run.
    """
    target = folder(quick)
    text = json.dumps(record, indent=1, sort_keys=True)
    (target / f"{part}.json").write_text(text + "\n", encoding="utf-8")
    (target / f"{part}.md").write_text(markdown(sections), encoding="utf-8")


def markdown(sections: Sequence[tuple[Any, ...]]) -> str:
    """Return sections in Markdown, under headings of the third level, the machine before them."""
    blocks = [f"*{in_words(machine())}*"]
    for title, content, *notes in sections:
        file = io.StringIO()
        Console(file=file, width=1000, color_system=None).print(content)
        # rich pads every line to the table's width, and puts empty ones around it.
        lines = [line.strip() for line in file.getvalue().splitlines()]
        blocks += [f"### {title}", "\n".join(line for line in lines if line), *filter(None, notes)]
    return "\n\n".join(blocks) + "\n"


def show(sections: Sequence[tuple[Any, ...]]) -> None:
    """Print sections on the console."""
    for title, content, *notes in sections:
        console.print(f"\n{title}", style="bold", markup=False)
        console.print(content)
        for note in filter(None, notes):
            say(note)


def table(first: str, *others: str) -> Table:
    """Return a table that prints as Markdown: the first column is text, the others are figures."""
    made = Table(box=box.MARKDOWN)
    made.add_column(first)
    for heading in others:
        made.add_column(heading, justify="right")
    return made


def say(text: str) -> None:
    """Print a line of progress at once."""
    console.print(text, markup=False, soft_wrap=True)
    sys.stdout.flush()
