"""`lorakit analyze`: measures of adapters, as tables, JSON, figures and reports."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from lorakit.cli.help import entry
from lorakit.cli.measures import MEASURES, Findings
from lorakit.cli.parsing import parse
from lorakit.errors import ConfigurationError, nearest
from lorakit.formatting import visible

if TYPE_CHECKING:
    from rich.console import Console

CONFIGS = tuple(measure.options for measure in MEASURES.values())


def run(argv: Sequence[str]) -> None:
    """Parse the measure and its options, compute it, and print it."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        sys.exit(0)
    name, *rest = argv
    if name not in MEASURES:
        raise ConfigurationError(
            f"Unknown measure '{name}'.{nearest(name, MEASURES)} Measures: {', '.join(MEASURES)}."
        )
    measure = MEASURES[name]
    config: Any = parse(
        measure.options, f"analyze {name}", f"{measure.about}.", rest, *measure.subjects
    )
    config.require_writable()
    findings = measure.find(config)
    written = config.write(findings.draw, partial(_page, name, config, findings))
    if config.json:
        from lorakit.cli.console import print_json

        print_json(findings.facts)
    else:
        _print(config, findings, written)


def _overview() -> str:
    column = max(map(len, MEASURES)) + 4
    lines = "\n".join(entry(name, one.about, column) for name, one in MEASURES.items())
    return (
        "usage: lorakit analyze MEASURE ADAPTER [OTHER] [--option VALUE ...]\n\n"
        f"Analyze adapters.\n\n{lines}\n\n'lorakit analyze MEASURE --help' lists the options."
    )


def _page(name: str, config: Any, findings: Findings, command: str) -> Any:
    """Return the report; `command` reproduces it."""
    from lorakit.analysis.report import measure_page

    return measure_page(
        name,
        about=MEASURES[name].about,
        subjects=[getattr(config, subject) for subject in MEASURES[name].subjects],
        lines=findings.lines,
        heading=findings.caption and f"{findings.caption}.",
        rows=findings.rows,
        what=findings.what,
        drawn=[findings.draw()],
        notices=findings.facts["notices"],
        command=command,
    )


def _print(config: Any, findings: Findings, written: list[str]) -> None:
    from lorakit.cli.console import console
    from lorakit.cli.layer_table import layer_table

    out: Console = console()
    each = findings.caption is not None or config.layers
    table = layer_table(findings.rows, each=each, what=findings.what)
    if findings.caption is None:
        out.print(table)
    for line in findings.lines:
        out.print(line, markup=False)
    if findings.caption is not None:
        out.print(f"{findings.caption}:", markup=False)
        out.print(table)
    for notice in findings.facts["notices"]:
        out.print(visible(f"note: {notice}"), markup=False)
    for line in written:
        out.print(line, markup=False)
