"""`lorakit combine`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lorakit.cli.algebra import ResultConfig, check_before, finish
from lorakit.models.base_config import BaseConfig


@dataclass(frozen=True, kw_only=True)
class CombineConfig(ResultConfig):
    """What `lorakit combine` puts together."""

    adapters: list[str]
    """Adapter folders (lorakit's or PEFT's), loralib files, or checkpoint folders of runs."""
    weights: list[float] | None = None
    """A factor for each adapter, as [0.7, 0.3]; by default 1 for all."""
    how: Literal["sum", "ties", "dare"] = "sum"
    """sum adds the changes exactly; ties and dare work on their entries, and approximate the result."""
    density: float = 1.0
    """For ties and dare: the share of entries to keep."""
    seed: int = 0
    """Seed of the entries that dare drops."""
    rank: int | None = None
    """Compress the result to this rank."""
    energy: float | None = None
    """Compress the result to the rank that keeps this share of each layer's squared norm."""
    alpha: float | None = None
    """The constant of loralib files, which do not record it."""
    base: BaseConfig | None = None
    """The base model to score on; by default the one that the adapters record."""
    allow_other_base: bool = False
    """Combine adapters of different bases, or score on another base, knowing what that means."""


def run(argv: Sequence[str]) -> None:
    """Combine, score, save."""
    from lorakit.analysis import combine_adapters
    from lorakit.cli.parsing import parse

    folders = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    named = ["--adapters", json.dumps(folders)] if folders else []
    config = parse(
        CombineConfig,
        "combine",
        "Put adapters of one base together: their weighted sum, exactly, or TIES or DARE; alone, with weight 1, "
        "any adapter stays what it is. Usage: lorakit combine ADAPTER ADAPTER ... --output OUTPUT "
        "--weights '[0.7, 0.3]'.",
        [*named, *argv[len(folders) :]],
    )
    check_before(config)
    settings = {
        name: getattr(config, name)
        for name in ("weights", "how", "density", "seed", "rank", "energy")
    }
    made = combine_adapters(
        config.adapters, **settings, alpha=config.alpha, allow_other_base=config.allow_other_base
    )
    finish(
        made,
        config,
        config.adapters,
        {"command": "combine", **settings},
        alpha=config.alpha,
        base=config.base,
        allow_other_base=config.allow_other_base,
    )
