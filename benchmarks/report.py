"""Output of results: JSON, Markdown for the documentation, and the same tables on the console."""

from __future__ import annotations

import datetime
import io
import json
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from lorakit import storage
from lorakit.training.environment import environment

RESULTS = Path(__file__).parent / "results"
"""Folder of the results; `write_results_to` replaces it."""
PACKAGES = ("torch", "transformers", "peft", "trl", "loralib", "accelerate")

console = Console(highlight=False)
if not console.is_terminal:
    console = Console(highlight=False, width=190)  # wide enough for whole tables in a log


class Section(NamedTuple):
    """A table with its title and a note."""

    title: str
    table: Table
    note: str = ""


def machine() -> dict[str, Any]:
    """Return a description of this machine and its software."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    current = environment(device)
    return {
        "date": datetime.date.today().isoformat(),
        "processor": current["processor"],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": current["device"],
        "instructions": _instructions(),
        "platform": platform.platform(),
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in PACKAGES},
        },
    }


def _instructions() -> str:
    """Return the widest vector instructions, and AMX if the CPU has it."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # missing in older releases
    matrices = ["AMX"] if capabilities.get("amx_tile") else []
    return " and ".join([torch.backends.cpu.get_cpu_capability(), *matrices])


def in_words(machine: dict[str, Any]) -> str:
    """Describe a machine in a sentence."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    gpu = "no GPU" if machine["device"] == "cpu" else machine["device"]
    return (
        f"{machine['date']}: {machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['instructions']}, {gpu}; {versions}."
    )


def write_results_to(path: Path) -> None:
    """Write the results of this process to another folder, for example those of a second machine."""
    global RESULTS
    RESULTS = path.resolve()


def folder(quick: bool) -> Path:
    """Return the folder for results. Quick runs have their own, because the documentation includes the others."""
    path = RESULTS / "quick" if quick else RESULTS
    path.mkdir(parents=True, exist_ok=True)
    return path


def work(quick: bool) -> Path:
    """Return the folder that caches the results of single runs, for `--resume`."""
    return RESULTS / "work" / ("quick" if quick else "full")


def write(part: str, record: dict[str, Any], sections: Sequence[Section], quick: bool) -> None:
    """Write the results of a part as JSON and its tables as Markdown.

    Args:
        part: Name of the files.
        record: All results.
        sections: The tables.
        quick: Whether this is a quick run.
    """
    target = folder(quick)
    texts = {"json": json.dumps(record, indent=1, sort_keys=True) + "\n", "md": markdown(sections)}
    for ending, text in texts.items():
        with storage.atomic_file(target / f"{part}.{ending}") as file:
            file.write_text(text, encoding="utf-8")


def publish(part: str, record: dict[str, Any], sections: Iterable[Section], quick: bool) -> None:
    """Write the results of a part, and print its tables. See :func:`write`."""
    tables = list(sections)
    write(part, record, tables, quick)
    show(tables)


def markdown(sections: Iterable[Section]) -> str:
    """Return sections in Markdown, with headings of level 3, after a line about the machine."""
    blocks = [f"*{in_words(machine())}*"]
    for title, content, note in sections:
        file = io.StringIO()
        Console(file=file, width=1000, color_system=None).print(content)
        # rich pads every line to the width of the table, and adds empty lines.
        lines = [line.strip() for line in file.getvalue().splitlines()]
        blocks += [f"### {title}", "\n".join(line for line in lines if line)]
        if note:
            blocks.append(note)
    return "\n\n".join(blocks) + "\n"


def show(sections: Iterable[Section]) -> None:
    """Print sections on the console."""
    for title, content, note in sections:
        console.print(f"\n{title}", style="bold", markup=False)
        console.print(content)
        if note:
            say(note)


def table(first: str, *others: str) -> Table:
    """Return an empty table that prints as Markdown, with a text column and right-aligned columns."""
    empty = Table(box=box.MARKDOWN)
    empty.add_column(first)
    for heading in others:
        empty.add_column(heading, justify="right")
    return empty


def say(text: str) -> None:
    """Print a line and flush it."""
    console.print(text, markup=False, soft_wrap=True)
    sys.stdout.flush()
