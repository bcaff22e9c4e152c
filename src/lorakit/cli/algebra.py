"""Options and output that `lorakit compress`, `combine` and `extract` share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorakit.configuration import LocalPath
from lorakit.evaluation.scoring_config import ScoringConfig
from lorakit.formatting import percentage, visible
from lorakit.models.base_config import BaseConfig

if TYPE_CHECKING:
    from lorakit.analysis.derived import Derived
    from lorakit.analysis.saving import Input
    from lorakit.compute.agreement import Agreement


@dataclass(frozen=True, kw_only=True)
class ResultConfig(ScoringConfig):
    """Where to save a computed adapter, and how to score it. Without data, nothing is scored."""

    output: LocalPath
    """Folder for the adapter. Must not exist unless overwrite is set."""
    overwrite: bool = False
    """Replace an existing adapter folder."""
    layers: bool = False
    """Print one line per layer instead of one per kind of layer."""
    json: bool = False
    """Print JSON."""
    rank: int | None = None
    """Largest rank of every layer of the result; set this or energy."""
    energy: float | None = None
    """Choose for every layer the rank that keeps this fraction of its squared norm, for example 0.95; set this or
    rank."""


@dataclass(frozen=True, kw_only=True)
class OfAdaptersConfig(ResultConfig):
    """Options of `lorakit compress` and `combine`, which compute an adapter from adapters."""

    alpha: float | None = None
    """alpha of loralib files, which do not store it."""
    base: BaseConfig | None = None
    """The base model to score on. Default: the base recorded in the adapters."""
    allow_other_base: bool = False
    """Allow scoring on a base that the adapters do not record."""


def finish(
    derived: Derived,
    config: ResultConfig,
    inputs: Sequence[str | Input],
    settings: dict[str, Any],
    base: BaseConfig | None,
) -> None:
    """Score, save and print the computed adapter."""
    from lorakit.analysis.saving import save
    from lorakit.cli.console import console, print_json, print_scores
    from lorakit.cli.layer_table import layer_table

    of_adapters = isinstance(config, OfAdaptersConfig)
    saved = save(
        derived,
        config.output,
        inputs=inputs,
        settings=settings,
        scoring=config,
        base=base,
        allow_other_base=of_adapters and config.allow_other_base,
        overwrite=config.overwrite,
    )
    notices = [*derived.notices, *saved.notices]
    if config.json:
        facts = {**derived.to_json(), "scores": saved.scores, "notices": notices}
        print_json(facts)
        return
    out = console()
    rows = {
        path: {"rank": layer.rank, "norm": layer.norm, "error": layer.error}
        for path, layer in derived.layers.items()
    }
    out.print(layer_table(rows, each=config.layers, what="layer"))
    out.print(
        f"{derived.adapter.num_parameters:,} parameters in {config.output}. Relative error {percentage(derived.error)} "
        "(Frobenius norm).",
        markup=False,
    )
    if derived.agreement is not None:
        out.print(_agreement(derived.agreement), markup=False)
    if saved.scores:
        print_scores(saved.scores)
    for notice in notices:
        out.print(visible(f"note: {notice}"), markup=False)


def _agreement(found: Agreement) -> str:
    """Return in words how closely an extracted adapter predicts what the fine-tuned model predicts."""
    share = f" ({percentage(found.changed, found.predictions)})" if found.changed else ""
    first = (
        f"Compared with the fine-tuned model in {found.where}."
        if found.predicts == "score"
        else f"The most likely {found.predicts} differs from the fine-tuned model's in {found.changed or 'none'} of "
        f"{found.where}{share}."
    )
    return f"{first} Largest difference of the logits: {found.difference:.2g}; largest logit: {found.scale:.3g}."
