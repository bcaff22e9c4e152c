"""`lorakit compress`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorakit.cli.algebra import ResultConfig, finish
from lorakit.models.base_config import BaseConfig


@dataclass(frozen=True, kw_only=True)
class CompressConfig(ResultConfig):
    """Options of `lorakit compress`."""

    adapter: str
    """Adapter folder (lorakit or PEFT), a loralib file, or a run's checkpoint folder."""
    alpha: float | None = None
    """alpha of a loralib file, which does not store it."""
    base: BaseConfig | None = None
    """The base model to score on. Default: the base recorded in the adapter."""
    allow_other_base: bool = False
    """Allow scoring on a base other than the one recorded in the adapter."""


def run(argv: Sequence[str]) -> None:
    """Compress, score and save."""
    from lorakit.analysis import compress_adapter
    from lorakit.analysis.saving import check_output
    from lorakit.cli.parsing import parse

    config = parse(
        CompressConfig,
        "compress",
        "Reduce the rank of an adapter: the best approximation of each layer's weight update, with its error. "
        "Usage: lorakit compress ADAPTER OUTPUT --rank 4.",
        argv,
        "adapter",
        "output",
    )
    check_output(config.output, overwrite=config.overwrite)
    compressed = compress_adapter(
        config.adapter, rank=config.rank, energy=config.energy, alpha=config.alpha
    )
    finish(
        compressed,
        config,
        [config.adapter],
        {"command": "compress", "rank": config.rank, "energy": config.energy},
        alpha=config.alpha,
        base=config.base,
        allow_other_base=config.allow_other_base,
    )
