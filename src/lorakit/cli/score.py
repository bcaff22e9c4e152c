"""`lorakit score`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorakit.cli.parsing import parse
from lorakit.configuration import LocalPath
from lorakit.evaluation.score_files import Family


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Options of `lorakit score`."""

    outputs: LocalPath
    """File of generated texts: plain text, one per line, or rows (.jsonl, .csv, ...) with a column output."""
    references: LocalPath | None = None
    """File of references: one per line, with an empty line between groups, or rows with references, label or
    WikiSQL's columns. Default: the rows of outputs contain them."""
    metrics: Family
    """Metrics to compute: those of a data set of the paper (rouge is SAMSum's), classification or regression."""
    java: bool | None = None
    """Run METEOR and the PTB tokenizer in Java. Default: true if Java is installed."""
    json: bool = False
    """Print JSON."""


CONFIGS = (ScoreConfig,)


def run(argv: Sequence[str]) -> None:
    """Score the files and print the scores."""
    config = parse(
        ScoreConfig,
        "score",
        "Score a file of generated texts with the metrics of a data set of the paper, on the scale of its official "
        "scorer.",
        argv,
        "outputs",
        "references",
    )
    from lorakit.cli.console import print_json, print_scores
    from lorakit.evaluation.score_files import score_files

    scores = score_files(config.outputs, config.references, config.metrics, java=config.java)
    if config.json:
        print_json(scores)
    else:
        print_scores({"value": scores})
