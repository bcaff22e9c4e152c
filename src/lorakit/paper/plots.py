"""The figure of a comparison: score against trained parameters, a panel for each column."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import ConfigurationError
from lorakit.paper.comparison import Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which all kinds of colour vision tell apart, each with a marker of its own.
STYLES: dict[str, tuple[str, str]] = {
    "FT": ("#000000", "s"),
    "FT-Top2": ("#595959", "D"),
    "BitFit": ("#56B4E9", "v"),
    "AdapterH": ("#E69F00", "^"),
    "AdapterL": ("#009E73", "<"),
    "AdapterP": ("#CC79A7", ">"),
    "PreLayer": ("#0072B2", "P"),
    "PreEmbed": ("#999933", "X"),
    "LoRA": ("#D55E00", "o"),
}
_OTHER = ("#882255", "*")
ACROSS = 4
"""Panels in a row."""


def save_plot(found: Comparison, path: Path) -> bool:
    """Draw ours, filled, and the paper's, hollow; return whether there was anything to draw.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigurationError(
            "The figure needs matplotlib. Install it with: pip install 'lorakit[analysis]'"
        ) from None
    columns = [name for name in found.columns if any(name in row.cells for row in found.own)]
    if not columns:
        return False
    down = -(-len(columns) // ACROSS)
    across = min(len(columns), ACROSS)
    figure = Figure(figsize=(0.8 + 2.9 * across, 0.9 + 2.7 * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for axis, name in zip(axes, columns, strict=False):
        _panel(axis, found, name)
    for axis in axes[len(columns) :]:
        axis.set_visible(False)
    handles: dict[str, Any] = {}
    for axis in axes[: len(columns)]:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=5,
        frameon=False,
        fontsize=8,
    )
    figure.suptitle(
        f"{found.grid.study.table.name.replace('table', 'Table ')}: {found.grid.config.base.name} (filled) and the "
        "paper's models (hollow)",
        fontsize=10,
    )
    figure.savefig(
        path,
        dpi=130,
    )
    return True


def _panel(axis: Axes, found: Comparison, name: str) -> None:
    for row in found.published:
        count = row.parameter_count
        if count is None:
            continue
        colour, marker = STYLES.get(row.method, _OTHER)
        axis.plot(
            count,
            row.cells[name].value,
            marker,
            color=colour,
            fillstyle="none",
            markersize=5,
            alpha=0.6,
        )
    for row in found.own:
        if row.trained is None or name not in row.cells:
            continue
        colour, marker = STYLES.get(row.variant.method, _OTHER)
        cell = row.cells[name]
        axis.errorbar(
            row.trained,
            cell.value,
            yerr=cell.spread or 0,
            fmt=marker,
            color=colour,
            markersize=7,
            capsize=2,
            label=row.variant.method,
        )
    axis.set_xscale("log")
    axis.set_title(name, fontsize=9)
    axis.set_xlabel("trained parameters", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.25)
