"""`lorakit score`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from lorakit.evaluation.score_files import Family


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """What `lorakit score` scores, and how."""

    outputs: str
    """File of outputs: plain text, one a line, or rows (.jsonl, .csv, ...) with a column output."""
    references: str | None = None
    """File of references: one a line, an empty line between groups; or rows with references, label or WikiSQL's
    columns. Without it, the rows of outputs have them."""
    metrics: Family
    """Which metrics: those of a data set of the paper (rouge is SAMSum's), or of any classification or regression."""
    java: bool | None = None
    """Run METEOR and the PTB tokenizer in Java: true, false, or, by default, where Java is installed."""
    json: bool = False
    """Print JSON for programs."""


def run(argv: Sequence[str]) -> None:
    """Score the files and print the scores."""
    from rich.table import Table

    from lorakit.cli.console import console
    from lorakit.cli.parsing import parse
    from lorakit.evaluation.score_files import score_files

    config = parse(
        ScoreConfig,
        "score",
        "Score outputs in a file with the metrics of a data set of the paper, on the scale of its official scorer. "
        "Usage: lorakit score OUTPUTS [REFERENCES] --metrics e2e.",
        argv,
        "outputs",
        "references",
    )
    scores = score_files(config.outputs, config.references, config.metrics, java=config.java)
    if config.json:
        print(json.dumps(scores, indent=2))
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("score")
    table.add_column("value", justify="right")
    for name, value in scores.items():
        table.add_row(name, f"{value:.4f}")
    console().print(table)
