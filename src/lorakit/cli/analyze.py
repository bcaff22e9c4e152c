"""`lorakit analyze`: measures of adapters, as tables, JSON, figures and reports.

`lorakit.cli.measures` has a function for each measure, with the same name.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from lorakit.cli.analyze_options import (
    AmplificationConfig,
    DriftConfig,
    IntrudersConfig,
    OutputFiles,
    PairConfig,
    SimilarityConfig,
    SpectrumConfig,
)
from lorakit.cli.help import entry
from lorakit.cli.options import missing_options
from lorakit.cli.parsing import parse
from lorakit.errors import ConfigurationError, nearest
from lorakit.formatting import visible

if TYPE_CHECKING:
    from lorakit.analysis.report import Findings

MEASURES: dict[str, tuple[str, type[OutputFiles]]] = {
    "spectrum": (
        "Singular values of the weight update: effective rank, energy by rank, suggested rank",
        SpectrumConfig,
    ),
    "similarity": (
        "Overlap between the singular directions of two adapters (ranks, seeds, tasks)",
        SimilarityConfig,
    ),
    "amplification": (
        "How much the adapter amplifies directions of its base (the paper's Table 7 and figure 8)",
        AmplificationConfig,
    ),
    "intruders": (
        "Singular vectors of the adapted weights that match none of the base's",
        IntrudersConfig,
    ),
    "diff": (
        "Distance and angle between two adapters or checkpoints, and the layers that differ most",
        PairConfig,
    ),
    "drift": (
        "KL divergence of the adapted model's predictions from the base's on a text",
        DriftConfig,
    ),
}
"""Description of each measure, for help and reports, and its options. The required options name the files to read."""

CONFIGS = tuple(options for _, options in MEASURES.values())


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
    about, options = MEASURES[name]
    required = missing_options(options, {})
    config: Any = parse(options, f"analyze {name}", f"{about}.", rest, *required)
    config.require_writable()
    from lorakit.analysis.report import measure_page
    from lorakit.cli import measures
    from lorakit.cli.console import print_json

    findings: Findings = getattr(measures, name)(config)
    subjects = [getattr(config, option) for option in required]
    page = partial(measure_page, name, about, subjects, findings)
    written = config.write(findings.draw, page)
    if config.json:
        print_json(findings.facts)
    else:
        _print(config, findings, written)


def _overview() -> str:
    column = max(map(len, MEASURES)) + 4
    lines = "\n".join(entry(name, about, column) for name, (about, _) in MEASURES.items())
    return (
        "usage: lorakit analyze MEASURE ADAPTER [OTHER] [--option VALUE ...]\n\n"
        f"Analyze adapters.\n\n{lines}\n\n'lorakit analyze MEASURE --help' lists the options."
    )


def _print(config: Any, findings: Findings, written: list[str]) -> None:
    from lorakit.cli.console import console
    from lorakit.cli.layer_table import layer_table

    out = console()
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
