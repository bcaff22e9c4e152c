"""Figures of the measures, drawn with `lorakit.reporting`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorakit.analysis.amplification import AdapterAmplification
from lorakit.analysis.deltas import families
from lorakit.analysis.diff import AdapterDiff
from lorakit.analysis.drift import Drift
from lorakit.analysis.intruders import AdapterIntruders
from lorakit.analysis.similarity import AdapterSimilarity
from lorakit.analysis.spectrum import ENERGY, AdapterSpectrum
from lorakit.formatting import number
from lorakit.reporting import Figure
from lorakit.reporting.axes import Mark, short_names
from lorakit.reporting.charts import Chart, Series, dot_chart, histogram, line_chart, shortened
from lorakit.reporting.heat_maps import heat_map

PANELS = 3
"""Number of blocks to show: the first, one in the middle, the last."""
LARGEST = 64
"""Maximum rows and columns of a similarity map; of higher ranks it shows the leading directions."""
CELLS = 16_000
"""Maximum cells of a map of matrices, and of the maps of two adapters, so that a figure stays below two megabytes."""
LEAST_COLUMNS = 16
"""Columns below which a map leaves out matrices instead."""


def spectrum_figure(spectra: AdapterSpectrum, energy: float = ENERGY) -> Figure:
    """Draw the share of the squared norm kept at each rank, for every matrix and for the whole adapter."""
    width = len(spectra.energy)
    layers, most, note = fitted(spectra.layers, width, "ranks")
    columns = spread_indices(width, most)
    shares = []
    for layer in layers.values():
        kept = layer.energy.tolist() + [1.0] * (width - len(layer.energy))
        shares.append([kept[column] for column in columns])
    each = heat_map(
        "Each matrix: share of the squared norm",
        shares,
        x="rank kept",
        y="",
        value="share",
        names=list(layers),
        columns=[column + 1 for column in columns],
    )
    suggested = spectra.rank_for(energy)
    # An untrained adapter has no rank to suggest.
    marks = [Mark(at=suggested, text=f"rank {suggested} keeps {100 * energy:.4g} %")]
    whole = line_chart(
        "Whole adapter: share of the squared norm",
        [Series(name="share", points=list(enumerate(spectra.energy.tolist(), 1)), dots=True)],
        x="rank kept",
        y="share of the squared norm",
        y_domain=(0, 1.02),
        y_format=".0%",
        marks=[*(marks if suggested else []), Mark(at=energy, axis="y")],
    )
    caption = (
        "Share of the change that a lower rank would keep. A row that is bright from the first column on has one "
        "dominant direction. A row that brightens late uses its full rank."
    )
    return Figure(caption=caption + note, charts=(whole, each), name="spectrum")


def similarity_figure(similarity: AdapterSimilarity, side: str = "A") -> Figure:
    """Draw heat maps of phi(i, j), as in the paper's figures 3, 4, 6 and 7, and the level of random directions.

    Each row shows one of two kinds of matrices (for example W_q and W_v), each column a block. If one rank is more
    than twice the other, a second row enlarges the corner that both ranks cover.

    Args:
        similarity: Similarity of two adapters.
        side: "A" for the input directions, "B" for the output directions.
    """
    rows: list[list[tuple[str, Tensor]]] = []
    kinds = list(families(similarity.A if side == "A" else similarity.B).values())[:2]
    shown: list[dict[str, Any]] = []
    for layers in kinds:
        cells = max(one.phi[:LARGEST, :LARGEST].numel() for one in layers.values())
        shown.append(spread(layers, max(1, min(PANELS, CELLS // (cells * len(kinds)) - 1))))
    titles = map_titles([name for blocks in shown for name in blocks])
    for blocks in shown:
        first = next(iter(blocks.values()))
        panels = [(titles[name], one.phi[:LARGEST, :LARGEST]) for name, one in blocks.items()]
        level = first.random[:LARGEST, :LARGEST]
        panels.append((f"random directions, k = {first.width}", level))
        rows.append(panels)
        corner = min(first.phi.shape)
        if max(first.phi.shape) > 2 * corner and corner > 1:
            rows.append(
                [(f"{name}, i and j to {corner}", phi[:corner, :corner]) for name, phi in panels]
            )
    columns = max(map(len, rows))
    largest = max(float(phi[~phi.isnan()].max()) for panels in rows for _, phi in panels)
    charts = tuple(
        _phi_map(title, phi, largest, legend=column == len(panels) - 1)
        for panels in rows
        for column, (title, phi) in enumerate(panels)
    )
    space = "input" if side == "A" else "output"
    caption = (
        f"φ(i, j) of the {space} directions ({side}): similarity of the first adapter's leading i directions and the "
        "second's leading j. 1: one span contains the other. The last map of each row shows the expected level of "
        f"random directions. All maps use the same colour scale, from 0 to {number(largest)}."
    )
    return Figure(caption=caption, charts=charts, columns=columns, name=f"similarity-{side}")


def amplification_figure(amplification: AdapterAmplification) -> Figure:
    """Draw Table 7 for every matrix: the projections of W on three sets of directions, and the change's norm."""
    names, layers = list(amplification.layers), list(amplification.layers.values())
    norms = dot_chart(
        "W in the directions of the change",
        names,
        {
            "W's own directions": [one.projected_own for one in layers],
            "the change's directions": [one.projected for one in layers],
            "random directions": [one.expected_random for one in layers],
            "the change itself, ‖ΔW‖": [one.change_norm for one in layers],
        },
        x="‖UᵀWV‖ (Frobenius norm)",
        log=True,
    )
    factors = dot_chart(
        "Amplification factor",
        names,
        {"factor": [one.factor for one in layers]},
        x="‖ΔW‖ / ‖UᵀWV‖",
        zero=True,
        first_colour=1,
    )
    caption = (
        "If W is larger in the change's directions than in random ones, the change affects features that W already "
        "computes. If W is smaller there than in its own leading directions, the change does not repeat W's strongest "
        "features. The factor is the norm of the change divided by that of W in these directions."
    )
    return Figure(caption=caption, charts=(norms, factors), name="amplification")


def base_similarity_figure(amplification: AdapterAmplification) -> Figure:
    """Draw heat maps of phi between the base's and the change's leading directions, as in the paper's figure 8."""
    kinds = list(families(amplification.phi).values())[:2]
    maps = {name: phi for layers in kinds for name, phi in spread(layers).items()}
    largest = max(float(phi.max()) for phi in maps.values())
    charts = []
    titles = map_titles(list(maps))
    for i, (name, phi) in enumerate(maps.items(), 1):
        title = f"{titles[name]}, random {number(amplification.random_level(name))}"
        sampled = _sample_rows(phi[:, :LARGEST])
        step = phi.shape[0] / len(sampled)
        y = "i, base weight" if step == 1 else f"i / {step:.3g}, base weight"
        charts.append(_phi_map(title, sampled, largest, x="j, change", y=y, legend=i == len(maps)))
    caption = (
        "φ(i, j) of the input directions: the base weight's leading i and the change's leading j. Each title has the "
        "level of random directions at the last row and column."
    )
    return Figure(caption=caption, charts=tuple(charts), columns=3, name="base-similarity")


def intruders_figure(intruders: AdapterIntruders) -> Figure:
    """Draw each leading singular vector's largest cosine with the base's vectors, and mark the intruders."""
    examined = max(len(layer.cosine) for layer in intruders.layers.values())
    layers, most, note = fitted(intruders.layers, examined, "vectors")
    cosines, crosses = [], []
    for row, layer in enumerate(layers.values()):
        values = layer.cosine[:most].tolist()
        cosines.append(values + [math.nan] * (most - len(values)))
        marked = layer.is_intruder[:most].tolist()
        crosses += [(row, j) for j, intruder in enumerate(marked) if intruder]
    chart = heat_map(
        "Largest cosine with a base vector",
        cosines,
        x="singular vector",
        y="",
        value="cosine",
        names=list(layers),
        crosses=crosses,
    )
    caption = (
        "Largest cosine between each leading singular vector of the adapted weights and the base's vectors. Crosses "
        "mark intruders, which match none of the base's vectors."
    )
    return Figure(caption=caption + note, charts=(chart,), name="intruders")


def diff_figure(diff: AdapterDiff) -> Figure:
    """Draw the distance and the angle between the two changes of each matrix, and between tensors trained in full."""
    both = diff.changes_and_trained
    names, layers = list(both), list(both.values())
    distance = dot_chart(
        "Distance",
        names,
        {"distance": [one.distance for one in layers]},
        x="‖ΔW₂-ΔW₁‖ (Frobenius norm)",
        zero=True,
    )
    angles = [math.nan if one.angle is None else one.angle for one in layers]
    angle = dot_chart(
        "Angle between ΔW₁ and ΔW₂",
        names,
        {"angle": angles},
        x="degrees",
        zero=True,
        first_colour=1,
    )
    caption = (
        "Distance and angle between the two changes of each matrix, and between the values of each tensor trained in "
        "full (whole). 90 degrees: orthogonal."
    )
    return Figure(caption=caption, charts=(distance, angle), name="diff")


def drift_figure(drift: Drift) -> Figure:
    """Draw a histogram of the divergence of the predictions."""
    values = torch.tensor([kl for piece in drift.pieces for kl in piece.kl])
    floor = 1e-4
    edges = torch.logspace(
        -4, max(1.0, math.ceil(math.log10(float(values.max()) + floor))), 50, dtype=torch.float64
    )
    clamped = values.double().clamp(min=edges[0].item(), max=edges[-1].item())
    counts = torch.histogram(clamped, edges).hist
    chart = histogram(
        "Divergence of the predictions",
        edges.tolist(),
        [int(count) for count in counts],
        x="KL(base ‖ adapted) of a prediction, in nats",
        y="predictions",
        marks=[Mark(at=max(drift.kl, floor), text=f"mean {number(drift.kl)}")],
    )
    caption = "The first bar includes all smaller divergences."
    return Figure(caption=caption, charts=(chart,), name="drift")


def spread(layers: Mapping[str, Any], most: int = PANELS) -> dict[str, Any]:
    """Return up to `most` matrices, evenly spaced from the first to the last."""
    names = list(layers)
    return {names[i]: layers[names[i]] for i in spread_indices(len(names), most)}


def fitted(layers: Mapping[str, Any], columns: int, what: str) -> tuple[dict[str, Any], int, str]:
    """Return the rows and the number of columns of a map of matrices with at most `CELLS` cells, and a note.

    The note is for the caption: how many of the matrices and of the columns (`what`) are shown, or nothing if all are.
    """
    rows = spread(layers, CELLS // min(columns, LEAST_COLUMNS))
    most = min(columns, CELLS // len(rows))
    note = (
        f" The map shows {len(rows):,} of {len(layers):,} matrices and {most} of {columns} {what}."
    )
    return rows, most, "" if (len(rows), most) == (len(layers), columns) else note


def spread_indices(count: int, most: int) -> list[int]:
    """Return up to `most` evenly spaced indices of `count` items, from the first to the last."""
    most = min(most, count)
    return sorted({round(i * (count - 1) / max(most - 1, 1)) for i in range(most)})


def map_titles(names: Sequence[str]) -> dict[str, str]:
    """Return the names of matrices in a form that leaves room for a number in the title of a map."""
    short = short_names(names)
    labels = shortened(short)
    return {name: labels[label] for name, label in zip(names, short, strict=True)}


def _sample_rows(phi: Tensor) -> Tensor:
    """Return at most `LARGEST` evenly spaced rows: the base has hundreds of directions."""
    rows = phi.shape[0]
    if rows <= LARGEST:
        return phi
    return phi[[(k + 1) * rows // LARGEST - 1 for k in range(LARGEST)]]


def _phi_map(
    title: str,
    phi: Tensor,
    largest: float,
    *,
    x: str = "j, second adapter",
    y: str = "i, first adapter",
    legend: bool,
) -> Chart:
    return heat_map(title, phi.tolist(), x=x, y=y, value="φ", domain=(0.0, largest), legend=legend)
