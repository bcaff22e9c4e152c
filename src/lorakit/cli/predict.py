"""`lorakit predict`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lorakit import storage
from lorakit.cli.parsing import parse
from lorakit.evaluation.predict_config import PredictConfig

CONFIGS = (PredictConfig,)


def run(argv: Sequence[str]) -> None:
    """Predict the rows, write them and print how often each class was predicted."""
    config = parse(
        PredictConfig,
        "predict",
        "Predict the labels or scores of rows that have none, with an adapter that was trained for classification or "
        "regression.",
        argv,
    )
    # Before the import of PyTorch, which takes seconds.
    storage.require_free_file(config.output, overwrite=config.overwrite)
    from lorakit.evaluation.predict import predict

    for note in config.data.template_notes:
        print(f"note: {note}.", file=sys.stderr)
    result = predict(config)
    print(f"rows         {result.report}")
    if result.counts:
        print(f"predictions  {', '.join(f'{name} {n:,}' for name, n in result.counts.items())}")
    print(f"output       {config.output}")
