"""`lorakit train`."""

from __future__ import annotations

from collections.abc import Sequence


def run(argv: Sequence[str]) -> None:
    """Train as the configuration says and print where the result lies."""
    from lorakit.cli.parsing import parse
    from lorakit.training.config import TrainConfig
    from lorakit.training.loop import train

    config = parse(
        TrainConfig,
        "train",
        "Train an adapter on your data: base, data, method and schedule in one configuration. "
        "The run folder holds the resolved configuration, metrics, checkpoints and the adapter.",
        argv,
    )
    result = train(config)
    print(result)
