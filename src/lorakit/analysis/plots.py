"""Figures of the measures, for the screen and for print: colour-blind safe, axes named with their units."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorakit.analysis.amplification import AdapterAmplification
from lorakit.analysis.deltas import family
from lorakit.analysis.diff import AdapterDiff
from lorakit.analysis.drift import Drift
from lorakit.analysis.intruders import AdapterIntruders
from lorakit.analysis.similarity import AdapterSimilarity
from lorakit.analysis.spectrum import ENERGY, AdapterSpectrum
from lorakit.errors import ConfigurationError, RunFolderError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which all kinds of colour vision tell apart, each with a marker of its own.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#595959"
COLOURS = "cividis"
"""A colour map of even lightness, readable in grey too."""
PANELS = 3
"""Blocks shown at once: the first, one in the middle, the last."""


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure; the suffix says the format (.png, .svg, .pdf).

    Raises:
        ConfigurationError: The suffix is of no such format.
        RunFolderError: The file cannot be written.
    """
    known = figure.canvas.get_supported_filetypes()
    suffix = Path(path).suffix.lstrip(".").lower()
    if suffix not in known:
        raise ConfigurationError(
            f"'{path}' does not say the figure's format. End it in .png, .svg or .pdf."
        )
    try:
        figure.savefig(path, dpi=200)
    except OSError as error:
        raise RunFolderError(f"Cannot write '{path}': {error.strerror or error}.") from None


def spectrum_figure(found: AdapterSpectrum, energy: float = ENERGY) -> Figure:
    """Share of the squared norm kept at each rank: of every matrix, and of the adapter as a whole."""
    width = max(len(layer.singular_values) for layer in found.layers.values())
    shares = torch.ones(len(found.layers), width)
    for row, layer in zip(shares, found.layers.values(), strict=True):
        row[: len(layer.energy)] = layer.energy
    figure = _figure(9, max(3.2, min(8.0, 1.6 + 0.11 * len(shares))))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    image = left.imshow(
        shares.numpy(),
        aspect="auto",
        cmap=COLOURS,
        vmin=0,
        vmax=1,
        extent=(0.5, width + 0.5, len(shares), 0),
    )
    _name_rows(left, list(found.layers))
    left.set(xlabel="rank kept", title="each matrix")
    _colour_bar(figure, image, left, "share of the squared norm")
    ranks = range(1, width + 1)
    right.plot(ranks, found.energy, color=BLUE, marker="o", markersize=3)
    suggested = found.rank_for(energy)
    right.axhline(energy, color=GREY, linestyle=":", linewidth=1)
    _mark(right, suggested, f"rank {suggested}\nkeeps {energy:.0%}", height=0.04)
    right.set(
        xlabel="rank kept",
        ylabel="share of the squared norm",
        title="whole adapter",
        ylim=(0, 1.02),
    )
    return figure


def similarity_figure(found: AdapterSimilarity, side: str = "A") -> Figure:
    """Heat maps of phi(i, j), as the paper's figures 3, 4, 6 and 7, and the level of random directions.

    A row for each of two kinds of matrices (W_q and W_v, say), a column for each of some blocks. Where the
    ranks differ, the corner that both have stands enlarged below.

    Args:
        found: The similarities.
        side: "A" for the input directions, "B" for the output directions.
    """
    rows: list[list[tuple[str, Tensor]]] = []
    for layers in _families(found.A if side == "A" else found.B)[:2]:
        chosen = spread(layers)
        first = next(iter(chosen.values()))
        panels = [(_two_lines(name), one.phi) for name, one in chosen.items()]
        panels.append((f"random directions\nexpected, k = {first.width}", first.random))
        rows.append(panels)
        corner = min(first.phi.shape)
        if max(first.phi.shape) > 2 * corner:
            rows.append([("", phi[:corner, :corner]) for _, phi in panels])
    columns = max(map(len, rows))
    figure = _figure(2.1 * columns + 0.9, 0.5 + 2.1 * len(rows))
    axes = figure.subplots(len(rows), columns, squeeze=False)
    largest = max(float(phi[~phi.isnan()].max()) for panels in rows for _, phi in panels)
    image = None
    for line, panels in zip(axes, rows, strict=True):
        for axis, (title, phi) in zip(line, panels, strict=False):
            image = _heat_map(axis, phi, largest)
            axis.set_title(title, fontsize=7)
        for axis in line[len(panels) :]:
            axis.remove()
        line[0].set_ylabel("i, first adapter")
    for axis in axes[-1]:
        axis.set_xlabel("j, second adapter")
    space = "input" if side == "A" else "output"
    _colour_bar(figure, image, axes, f"φ(i, j) of the {space} directions ({side})")
    return figure


def amplification_figure(found: AdapterAmplification) -> Figure:
    """Table 7 for every matrix: how much of W lies in three sets of directions, beside the change itself."""
    names = list(found.layers)
    layers = list(found.layers.values())
    figure = _figure(8, max(3.2, min(9.0, 1.8 + 0.16 * len(names))))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2), sharey=True)
    rows = range(len(names))
    for label, colour, marker, values in (
        ("W's own directions", BLUE, "s", [one.projected_own for one in layers]),
        ("the change's directions", ORANGE, "o", [one.projected for one in layers]),
        ("random directions", GREY, "x", [one.expected_random for one in layers]),
        ("the change itself, ‖ΔW‖", GREEN, "^", [one.change_norm for one in layers]),
    ):
        left.plot(
            values, rows, linestyle="", color=colour, marker=marker, markersize=4, label=label
        )
    left.set(xscale="log", xlabel="‖UᵀWV‖ (Frobenius norm)")
    left.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    right.plot(
        [one.factor for one in layers], rows, linestyle="", color=ORANGE, marker="o", markersize=4
    )
    right.set(xlabel="amplification factor ‖ΔW‖ / ‖UᵀWV‖", xlim=(0, None))
    _name_rows(left, names, at=0.0)
    return figure


def base_similarity_figure(found: AdapterAmplification) -> Figure:
    """Heat maps of phi between the base's leading directions and the change's, as the paper's figure 8."""
    chosen = {n: phi for layers in _families(found.phi)[:2] for n, phi in spread(layers).items()}
    figure = _figure(2.3 * len(chosen) + 0.9, 3.2)
    axes = figure.subplots(1, len(chosen), squeeze=False)[0]
    largest = max(float(phi.max()) for phi in chosen.values())
    image = None
    for axis, (name, phi) in zip(axes, chosen.items(), strict=True):
        image = _heat_map(axis, phi, largest)
        title = f"{_two_lines(name)}\nat random up to {found.random_level(name):.3f}"
        axis.set_title(title, fontsize=7)
        axis.set_xlabel("j, change")
    axes[0].set_ylabel("i, base weight")
    _colour_bar(figure, image, axes, "φ(i, j) of the input directions")
    return figure


def intruders_figure(found: AdapterIntruders) -> Figure:
    """Largest cosine of each leading singular vector with the base's; intruders stand out dark."""
    examined = max(len(layer.cosine) for layer in found.layers.values())
    cosines = torch.full((len(found.layers), examined), math.nan)
    for row, layer in zip(cosines, found.layers.values(), strict=True):
        row[: len(layer.cosine)] = layer.cosine
    figure = _figure(6, max(3.2, min(9.0, 1.8 + 0.13 * len(cosines))))
    axis = figure.subplots()
    image = axis.imshow(
        cosines.numpy(),
        aspect="auto",
        cmap=COLOURS,
        vmin=0,
        vmax=1,
        extent=(0.5, examined + 0.5, len(cosines), 0),
    )
    for y, layer in enumerate(found.layers.values()):
        at = [j + 1 for j, intruder in enumerate(layer.is_intruder.tolist()) if intruder]
        axis.plot(at, [y + 0.5] * len(at), linestyle="", marker="x", color="white", markersize=4)
    _name_rows(axis, list(found.layers))
    axis.set(xlabel="singular vector of the adapted weight (x: intruder)")
    _colour_bar(figure, image, axis, "largest cosine with a base vector")
    return figure


def diff_figure(found: AdapterDiff) -> Figure:
    """How far each matrix moved, relative to what it was, and the angle of its turn."""
    names = list(found.layers)
    layers = list(found.layers.values())
    figure = _figure(8, max(3.2, min(9.0, 1.6 + 0.16 * len(names))))
    left, right = figure.subplots(1, 2, sharey=True)
    rows = range(len(names))
    left.barh(rows, [one.distance for one in layers], color=BLUE)
    left.set(xlabel="distance ‖ΔW₂-ΔW₁‖ (Frobenius norm)")
    turned = [math.nan if one.angle is None else one.angle for one in layers]
    right.plot(turned, rows, linestyle="", marker="o", markersize=4, color=ORANGE)
    right.set(xlabel="angle between ΔW₁ and ΔW₂ (degrees)", xlim=(0, None))
    _name_rows(left, names, at=0.0)
    return figure


def drift_figure(found: Drift) -> Figure:
    """Distribution of the divergence over the predictions."""
    values = torch.tensor([kl for text in found.texts for kl in text.kl])
    floor = 1e-4
    edges = torch.logspace(-4, max(1.0, math.ceil(math.log10(float(values.max()) + floor))), 50)
    figure = _figure(6, 3.4)
    axis = figure.subplots()
    axis.hist(values.clamp(min=floor), bins=edges.tolist(), color=BLUE)
    _mark(axis, found.kl, f"mean {found.kl:.3g}", height=0.93)
    axis.set(
        xscale="log",
        xlabel="KL(base ‖ adapted) of a prediction (nats; the first bar holds all below)",
        ylabel="predictions",
    )
    return figure


# --- parts of figures ----------------------------------------------------------------------------


def _mark(axis: Any, x: float, text: str, *, height: float) -> None:
    """Draw a line at `x`, with its meaning beside it at this share of the axis' height."""
    axis.axvline(x, color=ORANGE, linestyle="--", linewidth=1)
    axis.annotate(
        text,
        (x, height),
        xycoords=("data", "axes fraction"),
        xytext=(4, 0),
        textcoords="offset points",
        color=ORANGE,
        fontsize=8,
    )


def _families(layers: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The matrices by kind: those whose names differ by the number of their block alone."""
    found: dict[str, dict[str, Any]] = {}
    for name, layer in layers.items():
        found.setdefault(family(name), {})[name] = layer
    return list(found.values())


def _two_lines(name: str) -> str:
    """A path broken at the dot nearest to its middle."""
    dots = [i for i, letter in enumerate(name) if letter == "."]
    if len(name) < 25 or not dots:
        return name
    middle = min(dots, key=lambda i: abs(i - len(name) / 2))
    return f"{name[: middle + 1]}\n{name[middle + 1 :]}"


def spread(layers: Mapping[str, Any]) -> dict[str, Any]:
    """A few of the matrices, from the first to the last at equal distances."""
    names = list(layers)
    count = min(PANELS, len(names))
    places = {round(i * (len(names) - 1) / max(count - 1, 1)) for i in range(count)}
    return {names[place]: layers[names[place]] for place in sorted(places)}


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigurationError(
            "Figures need matplotlib: pip install 'lorakit[analysis]'"
        ) from None
    return Figure(figsize=(width, height), layout="constrained")


def _heat_map(axis: Axes, phi: Tensor, largest: float) -> Any:
    rows, columns = phi.shape
    axis.tick_params(labelsize=7)
    return axis.imshow(
        phi.numpy(),
        aspect="auto",
        cmap=COLOURS,
        vmin=0,
        vmax=largest,
        interpolation="nearest",
        extent=(0.5, columns + 0.5, rows + 0.5, 0.5),
    )


def _colour_bar(figure: Figure, image: Any, axes: Any, label: str) -> None:
    bar = figure.colorbar(image, ax=axes, shrink=0.9)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _name_rows(axis: Axes, names: Sequence[str], at: float = 0.5) -> None:
    """The names of the rows from the top down, as many as can be read."""
    axis.set_ylim(len(names) - 0.5 + at, at - 0.5)
    step = max(1, math.ceil(len(names) / 60))
    axis.set_yticks([i + at for i in range(0, len(names), step)], names[::step], fontsize=6)
