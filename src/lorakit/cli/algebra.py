"""What `lorakit compress`, `combine` and `extract` have in common: their options, and how they end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorakit.analysis.saving import ScoringConfig

if TYPE_CHECKING:
    from lorakit.analysis.derived import Derived


@dataclass(frozen=True, kw_only=True)
class ResultConfig(ScoringConfig):
    """Where a calculated adapter goes, and how it is scored."""

    output: str
    """Folder for the adapter; must not exist unless overwrite is set."""
    overwrite: bool = False
    """Replace an existing adapter folder."""
    layers: bool = False
    """One line for each layer instead of one for each kind of layer."""
    json: bool = False
    """Print JSON for programs."""


def check_before(config: ResultConfig) -> None:
    """Refuse, before long work, what `finish` would refuse after it.

    Raises:
        RunFolderError: The output cannot be written.
        ConfigurationError: There is data, and none of it to score on.
    """
    from lorakit.analysis.saving import check_output

    check_output(config.output, overwrite=config.overwrite)
    _ = config.wanted


def finish(
    made: Derived,
    config: ResultConfig,
    inputs: Sequence[str],
    settings: dict[str, Any],
    **saving: Any,
) -> None:
    """Score, save, and print what was made."""
    from rich.markup import escape
    from rich.table import Table

    from lorakit.analysis.saving import save
    from lorakit.cli.layer_table import console, layer_table

    saved = save(
        made,
        config.output,
        inputs=inputs,
        settings=settings,
        scoring=config,
        overwrite=config.overwrite,
        **saving,
    )
    notices = [*made.notices, *saved.notices]
    if config.json:
        facts = {**made.to_json(), "scores": saved.scores, "notices": notices}
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    out = console()
    rows = {
        path: {"rank": layer.rank, "norm": layer.norm, "error": layer.error}
        for path, layer in made.layers.items()
    }
    out.print(layer_table(rows, each=config.layers, what="layer"))
    out.print(
        f"{made.adapter.parameters:,} parameters in {config.output}. It leaves out {made.error:.2%} of the change "
        "(Frobenius norms).",
        markup=False,
    )
    if saved.scores:
        table = Table(box=None, pad_edge=False)
        table.add_column("score")
        for name in saved.scores:
            table.add_column(escape(name), justify="right", overflow="fold")
        for score in saved.scores["result"]:
            cells = [
                f"{found[score]:.4f}" if score in found else "-" for found in saved.scores.values()
            ]
            table.add_row(escape(score), *cells)
        out.print(table)
    for notice in notices:
        out.print(f"note: {notice}", markup=False)
