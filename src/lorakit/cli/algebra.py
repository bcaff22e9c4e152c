"""Options and output that `lorakit compress`, `combine` and `extract` share."""

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
    """Where to save a computed adapter, and how to score it."""

    output: str
    """Folder for the adapter. Must not exist unless overwrite is set."""
    overwrite: bool = False
    """Replace an existing adapter folder."""
    layers: bool = False
    """Print one line per layer instead of one per kind of layer."""
    json: bool = False
    """Print JSON."""


def check_before(config: ResultConfig) -> None:
    """Reject, before the long computation, settings that `finish` would reject after it.

    Raises:
        RunFolderError: The output cannot be written.
        ConfigurationError: Data is set, but not the split to score on.
    """
    from lorakit.analysis.saving import check_output

    check_output(config.output, overwrite=config.overwrite)
    _ = config.wanted


def finish(
    derived: Derived,
    config: ResultConfig,
    inputs: Sequence[str],
    settings: dict[str, Any],
    **saving: Any,
) -> None:
    """Score, save and print the computed adapter."""
    from rich.markup import escape
    from rich.table import Table

    from lorakit.analysis.saving import save
    from lorakit.cli.layer_table import console, layer_table

    saved = save(
        derived,
        config.output,
        inputs=inputs,
        settings=settings,
        scoring=config,
        overwrite=config.overwrite,
        **saving,
    )
    notices = [*derived.notices, *saved.notices]
    if config.json:
        facts = {**derived.to_json(), "scores": saved.scores, "notices": notices}
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    out = console()
    rows = {
        path: {"rank": layer.rank, "norm": layer.norm, "error": layer.error}
        for path, layer in derived.layers.items()
    }
    out.print(layer_table(rows, each=config.layers, what="layer"))
    out.print(
        f"{derived.adapter.parameters:,} parameters in {config.output}. Relative error {derived.error:.2%} "
        "(Frobenius norm).",
        markup=False,
    )
    if saved.scores:
        table = Table(box=None, pad_edge=False)
        table.add_column("score")
        for name in saved.scores:
            table.add_column(escape(name), justify="right", overflow="fold")
        for score in saved.scores["result"]:
            cells = [
                f"{column[score]:.4f}" if score in column else "-"
                for column in saved.scores.values()
            ]
            table.add_row(escape(score), *cells)
        out.print(table)
    for notice in notices:
        out.print(f"note: {notice}", markup=False)
