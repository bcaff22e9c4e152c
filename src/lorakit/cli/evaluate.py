"""`lorakit evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def run(argv: Sequence[str]) -> None:
    """Score a base or an adapter and print the scores."""
    from rich.table import Table

    from lorakit import storage
    from lorakit.cli.console import console
    from lorakit.cli.parsing import parse
    from lorakit.cli.report import written
    from lorakit.evaluation.evaluate import evaluate
    from lorakit.evaluation.evaluate_config import EvaluateConfig
    from lorakit.reporting.evaluation_report import evaluation_page
    from lorakit.training.environment import command

    config = parse(
        EvaluateConfig,
        "evaluate",
        "Score a base model, or an adapter on it, on held-out data: loss and perplexity, BLEU and ROUGE-L of "
        "generated text, accuracy and F1 or correlations of labels.",
        argv,
    )
    page = None if config.output is None else Path(config.output).with_suffix(".html")
    if page is not None:
        storage.require_free_file(page, overwrite=config.overwrite)
    result = evaluate(config)
    table = Table(box=None, pad_edge=False)
    table.add_column("score")
    table.add_column("value", justify="right")
    for name, value in result.scores.items():
        table.add_row(name, f"{value:.4f}")
    console().print(table)
    if page is not None:
        print(f"outputs  {config.output}")
        print(f"report   {written(lambda: evaluation_page(config, result, command()).write(page))}")
