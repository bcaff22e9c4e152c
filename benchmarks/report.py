"""Where figures go: JSON for programs, Markdown for pages, the same tables on the console."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from lorakit.training.environment import environment

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "peft", "loralib", "accelerate")

console = Console(highlight=False)
if not console.is_terminal:
    console = Console(highlight=False, width=170)  # a log has room for whole tables


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
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "platform": platform.platform(),
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in PACKAGES},
        },
    }


def folder(quick: bool) -> Path:
    """Where results go: a quick run's do not replace those that pages quote."""
    path = RESULTS / "quick" if quick else RESULTS
    path.mkdir(parents=True, exist_ok=True)
    return path


def write(
    part: str, record: dict[str, Any], sections: Sequence[tuple[str, Table]], quick: bool
) -> None:
    """Write a part's figures as JSON and its titled tables as Markdown."""
    target = folder(quick)
    text = json.dumps(record, indent=1, sort_keys=True)
    (target / f"{part}.json").write_text(text + "\n", encoding="utf-8")
    with (target / f"{part}.md").open("w", encoding="utf-8") as file:
        plain = Console(file=file, width=1000, color_system=None)
        for title, table in sections:
            plain.print(f"### {title}\n", markup=False)
            plain.print(table)
            plain.print()
    # rich pads lines to the table's width.
    lines = (target / f"{part}.md").read_text(encoding="utf-8").splitlines()
    text = "\n".join(line.strip() for line in lines).rstrip("\n")
    (target / f"{part}.md").write_text(text + "\n", encoding="utf-8")


def show(sections: Sequence[tuple[str, Table]]) -> None:
    """Print titled tables on the console."""
    for title, table in sections:
        console.print(f"\n[bold]{title}[/bold]")
        console.print(table)


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
