"""`lorakit extract`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lorakit.cli.algebra import ResultConfig, finish
from lorakit.cli.parsing import parse
from lorakit.configuration import LocalPath
from lorakit.models.base_config import BaseConfig


@dataclass(frozen=True, kw_only=True)
class ExtractConfig(ResultConfig):
    """Options of `lorakit extract`."""

    tuned: LocalPath
    """The fine-tuned model: a folder, a hub id, or the output of full fine-tuning with lorakit."""
    base: BaseConfig
    """The base model it was fine-tuned from."""
    targets: list[str] | str = "all-linear"
    """Layers to factorise: roles (attention.qv, all-linear), names or regular expressions."""
    train_modules: list[str] = field(default_factory=list)
    """Modules to copy in full from the fine-tuned model (name suffixes), such as a head that the base lacks."""
    energy: float | None = None
    """Choose for every layer the rank that keeps this fraction of its squared difference, for example 0.95; set this or
    rank."""


CONFIGS = (ExtractConfig,)


def run(argv: Sequence[str]) -> None:
    """Extract, score and save."""
    config = parse(
        ExtractConfig,
        "extract",
        "Extract an adapter from the difference between a fine-tuned model and its base. Reports the error of each "
        "layer, what else differs between the models, and how often the most likely token differs.",
        argv,
        "tuned",
        "output",
    )
    from lorakit.analysis import extract_adapter
    from lorakit.analysis.compress import check_target
    from lorakit.analysis.saving import Input, check_output, check_scoring
    from lorakit.cli.console import StatusLine

    check_output(config.output, overwrite=config.overwrite)
    check_target(config.rank, config.energy)
    source = Input.of(config.tuned)
    check_scoring(config, config.base, source)
    targets = [config.targets] if isinstance(config.targets, str) else config.targets
    settings: dict[str, Any] = {
        "targets": targets,
        "train_modules": config.train_modules,
        "rank": config.rank,
        "energy": config.energy,
    }
    with StatusLine() as show:
        extracted = extract_adapter(config.base, config.tuned, **settings, progress=show)
    recorded = {"command": "extract", "base": config.base.name, **settings}
    finish(extracted, config, [source], recorded, config.base)
