"""`lorakit compress`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorakit.cli.algebra import OfAdaptersConfig, finish
from lorakit.cli.parsing import parse
from lorakit.configuration import LocalPath


@dataclass(frozen=True, kw_only=True)
class CompressConfig(OfAdaptersConfig):
    """Options of `lorakit compress`."""

    adapter: LocalPath
    """Adapter folder (lorakit or PEFT), a loralib file, or a run's checkpoint folder."""


CONFIGS = (CompressConfig,)


def run(argv: Sequence[str]) -> None:
    """Compress, score and save."""
    config = parse(
        CompressConfig,
        "compress",
        "Reduce the rank of an adapter: the best approximation of each layer's weight update, with its error.",
        argv,
        "adapter",
        "output",
    )
    from lorakit.analysis import compress_adapter
    from lorakit.analysis.compress import check_target
    from lorakit.analysis.derived import require_low_rank
    from lorakit.analysis.saving import Input, check_output, check_scoring

    check_output(config.output, overwrite=config.overwrite)
    check_target(config.rank, config.energy)
    source = Input.read(config.adapter, alpha=config.alpha)
    assert source.stored is not None
    require_low_rank(source.stored)
    check_scoring(config, config.base, source)
    settings = {"rank": config.rank, "energy": config.energy}
    compressed = compress_adapter(source.stored, **settings)
    recorded = {"command": "compress", **settings}
    finish(compressed, config, [source], recorded, config.base)
