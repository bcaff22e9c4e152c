"""`lorakit evaluate`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from lorakit import storage
from lorakit.cli.parsing import parse
from lorakit.evaluation.evaluate_config import EvaluateConfig

CONFIGS = (EvaluateConfig,)


def run(argv: Sequence[str]) -> None:
    """Score a base or an adapter and print the scores."""
    config = parse(
        EvaluateConfig,
        "evaluate",
        "Score a base model or an adapter on held-out data: loss and perplexity, BLEU and ROUGE-L of generated "
        "text, accuracy and F1 of class labels, correlations of regression scores.",
        argv,
    )
    page = None if config.output is None else Path(config.output).with_suffix(".html")
    # Before the imports of PyTorch, which take seconds.
    for path in filter(None, (config.output, page)):
        storage.require_free_file(path, overwrite=config.overwrite)
    from lorakit.cli.console import ProgressLine, print_scores
    from lorakit.cli.report import try_to_write
    from lorakit.evaluation.evaluate import evaluate
    from lorakit.formatting import counted
    from lorakit.reporting.evaluation_report import answered, evaluation_page, scored_part
    from lorakit.training.environment import command

    for note in config.data.template_notes:
        print(f"note: {note}.", file=sys.stderr)
    result = evaluate(config, progress=ProgressLine())
    if result.base_scores:
        print_scores({"adapter": result.scores, "base": result.base_scores})
    else:
        print_scores({"value": result.scores})
    part = scored_part(config, result.split)
    print(f"on {counted(result.examples, 'example')} of the {part}{answered(result)}")
    if result.f1_class:
        print(f"f1 is that of class {result.f1_class!r}, the second of two")
    if page is not None:
        is_empty = "" if result.outputs else " (empty: the loss needs no generated text)"
        print(f"outputs  {config.output}{is_empty}")
        print(
            f"report   {try_to_write(lambda: evaluation_page(config, result, command()).write(page))}"
        )
