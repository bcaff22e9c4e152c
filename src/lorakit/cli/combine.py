"""`lorakit combine`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lorakit.cli.algebra import OfAdaptersConfig, finish
from lorakit.cli.parsing import parse
from lorakit.configuration import LocalPath


@dataclass(frozen=True, kw_only=True)
class CombineConfig(OfAdaptersConfig):
    """Options of `lorakit combine`."""

    adapters: list[LocalPath]
    """Adapter folders (lorakit or PEFT), loralib files, or checkpoint folders of runs."""
    weights: list[float] | None = None
    """One factor per adapter, for example 0.7 0.3. Default: 1 for all."""
    how: Literal["sum", "ties", "dare"] = "sum"
    """sum adds the weight updates exactly. ties and dare edit their entries, then approximate the result."""
    density: float | None = None
    """Fraction of entries that ties and dare keep, for example 0.2. Required for both."""
    seed: int = 0
    """Seed for the entries that dare drops."""
    rank: int | None = None
    """Largest rank of every layer of the result; by default the sum of the ranks."""
    energy: float | None = None
    """Choose for every layer the rank that keeps this fraction of its squared norm, for example 0.95."""
    allow_other_base: bool = False
    """Allow adapters of different bases, and scoring on a base that the adapters do not record."""


CONFIGS = (CombineConfig,)


def run(argv: Sequence[str]) -> None:
    """Combine, score and save."""
    config = parse(
        CombineConfig,
        "combine",
        "Combine LoRA adapters of one base: their exact weighted sum, TIES or DARE. A single one with weight 1 "
        "stays unchanged, also with DoRA, trained biases or modules.",
        argv,
        "adapters",
    )
    from lorakit.analysis import combine_adapters
    from lorakit.analysis.combine import check_combination
    from lorakit.analysis.deltas import alphas
    from lorakit.analysis.saving import Input, check_output, check_scoring

    check_output(config.output, overwrite=config.overwrite)
    each = zip(config.adapters, alphas(config.adapters, config.alpha), strict=True)
    sources = [Input.read(adapter, alpha=alpha) for adapter, alpha in each]
    stored = [source.stored for source in sources if source.stored is not None]
    check_combination(
        stored, config.weights, config.how, config.density, config.rank, config.energy
    )
    check_scoring(config, config.base, sources[0])
    settings = {
        name: getattr(config, name)
        for name in ("weights", "how", "density", "seed", "rank", "energy")
    }
    combined = combine_adapters(stored, **settings, allow_other_base=config.allow_other_base)
    recorded = {"command": "combine", **settings}
    finish(combined, config, sources, recorded, config.base)
