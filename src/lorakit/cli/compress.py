"""`lorakit compress`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorakit.cli.algebra import ResultConfig, check_before, finish
from lorakit.models.base_config import BaseConfig


@dataclass(frozen=True, kw_only=True)
class CompressConfig(ResultConfig):
    """What `lorakit compress` makes smaller."""

    adapter: str
    """Adapter folder (lorakit's or PEFT's), a loralib file, or a run's checkpoint folder."""
    rank: int | None = None
    """Cut every layer to this rank. Give rank or energy."""
    energy: float | None = None
    """Cut every layer to the rank that keeps this share of its squared norm, for example 0.95."""
    alpha: float | None = None
    """The constant of a loralib file, which does not record it."""
    base: BaseConfig | None = None
    """The base model to score on; by default the one that the adapter records."""
    allow_other_base: bool = False
    """Score on a base other than the one the adapter records, knowing what that means."""


def run(argv: Sequence[str]) -> None:
    """Compress, score, save."""
    from lorakit.analysis import compress_adapter
    from lorakit.cli.parsing import parse

    config = parse(
        CompressConfig,
        "compress",
        "Bring an adapter to a smaller rank: the best approximation of each layer's change, with the error of "
        "each. Usage: lorakit compress ADAPTER OUTPUT --rank 4.",
        argv,
        "adapter",
        "output",
    )
    check_before(config)
    made = compress_adapter(
        config.adapter, rank=config.rank, energy=config.energy, alpha=config.alpha
    )
    finish(
        made,
        config,
        [config.adapter],
        {"command": "compress", "rank": config.rank, "energy": config.energy},
        alpha=config.alpha,
        base=config.base,
        allow_other_base=config.allow_other_base,
    )
