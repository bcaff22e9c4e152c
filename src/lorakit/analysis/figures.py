"""Figures of the measures, drawn by `lorakit.reporting`: for a page, for the screen and for print."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lorakit.analysis.amplification import AdapterAmplification
from lorakit.analysis.deltas import family
from lorakit.analysis.diff import AdapterDiff
from lorakit.analysis.drift import Drift
from lorakit.analysis.intruders import AdapterIntruders
from lorakit.analysis.similarity import AdapterSimilarity
from lorakit.analysis.spectrum import ENERGY, AdapterSpectrum
from lorakit.reporting import Figure
from lorakit.reporting.axes import Mark
from lorakit.reporting.charts import Chart, Series, dot_chart, histogram, line_chart
from lorakit.reporting.heat_maps import heat_map

PANELS = 3
"""Blocks shown at once: the first, one in the middle, the last."""
LARGEST = 64
"""Rows and columns of a similarity map at most; of higher ranks the leading directions are shown."""
CELLS = 16_000
"""Cells of all maps of a figure together, which keeps a page with it below two megabytes."""


def spectrum_figure(found: AdapterSpectrum, energy: float = ENERGY) -> Figure:
    """Share of the squared norm kept at each rank: of every matrix, and of the adapter as a whole."""
    width = max(len(layer.singular_values) for layer in found.layers.values())
    shares = [
        layer.energy.tolist() + [1.0] * (width - len(layer.energy))
        for layer in found.layers.values()
    ]
    each = heat_map(
        "Each matrix: share of the squared norm",
        shares,
        x="rank kept",
        y="",
        value="share",
        names=list(found.layers),
    )
    suggested = found.rank_for(energy)
    whole = line_chart(
        "Whole adapter: share of the squared norm",
        [Series(name="share", points=list(enumerate(found.energy.tolist(), 1)), dots=True)],
        x="rank kept",
        y="share of the squared norm",
        y_domain=(0, 1.02),
        y_format=".0%",
        marks=[
            Mark(at=suggested, text=f"rank {suggested} keeps {energy:.0%}"),
            Mark(at=energy, text="", axis="y"),
        ],
    )
    caption = (
        "How much of the change a lower rank would keep. A row that is bright from the first column on holds one "
        "direction that matters; one that brightens late uses its whole rank."
    )
    return Figure(caption=caption, charts=(whole, each), name="spectrum")


def similarity_figure(found: AdapterSimilarity, side: str = "A") -> Figure:
    """Heat maps of phi(i, j), as the paper's figures 3, 4, 6 and 7, and the level of random directions.

    A row for each of two kinds of matrices (W_q and W_v, say), a column for each of some blocks. Where the
    ranks differ, the corner that both have stands enlarged below.

    Args:
        found: The similarities.
        side: "A" for the input directions, "B" for the output directions.
    """
    rows: list[list[tuple[str, Tensor]]] = []
    kinds = _families(found.A if side == "A" else found.B)[:2]
    for layers in kinds:
        cells = max(
            min(one.phi.shape[0], LARGEST) * min(one.phi.shape[1], LARGEST)
            for one in layers.values()
        )
        chosen = spread(layers, max(1, min(PANELS, CELLS // (cells * len(kinds)) - 1)))
        first = next(iter(chosen.values()))
        panels = [(name, one.phi[:LARGEST, :LARGEST]) for name, one in chosen.items()]
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
        _map(title, phi, largest, legend=place == len(panels) - 1)
        for panels in rows
        for place, (title, phi) in enumerate(panels)
    )
    space = "input" if side == "A" else "output"
    caption = (
        f"φ(i, j) of the {space} directions ({side}): the share of the first adapter's leading i directions that "
        "lies in the second's leading j. 1: one span contains the other; beside it, what directions drawn at random "
        f"would give. All maps have one scale of colours, from 0 to {largest:.3g}."
    )
    return Figure(caption=caption, charts=charts, columns=columns, name=f"similarity-{side}")


def amplification_figure(found: AdapterAmplification) -> Figure:
    """Table 7 for every matrix: how much of W lies in three sets of directions, beside the change itself."""
    names, layers = list(found.layers), list(found.layers.values())
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
        "Where the change's directions hold more of W than random ones do, it works on something that W already "
        "does; where they hold less than W's own, it does not repeat what W does most. The factor says by how much "
        "the change exceeds what W had there."
    )
    return Figure(caption=caption, charts=(norms, factors), name="amplification")


def base_similarity_figure(found: AdapterAmplification) -> Figure:
    """Heat maps of phi between the base's leading directions and the change's, as the paper's figure 8."""
    chosen = {n: phi for layers in _families(found.phi)[:2] for n, phi in spread(layers).items()}
    largest = max(float(phi.max()) for phi in chosen.values())
    charts = []
    for place, (name, phi) in enumerate(chosen.items()):
        title = f"{name}, at random up to {found.random_level(name):.3f}"
        shown = _rows_spread(phi[:, :LARGEST])
        step = phi.shape[0] / len(shown)
        y = "i, base weight" if step == 1 else f"i / {step:.3g}, base weight"
        charts.append(
            _map(title, shown, largest, x="j, change", y=y, legend=place == len(chosen) - 1)
        )
    caption = "φ(i, j) of the input directions: the base weight's leading i against the change's leading j."
    return Figure(caption=caption, charts=tuple(charts), columns=3, name="base-similarity")


def intruders_figure(found: AdapterIntruders) -> Figure:
    """Largest cosine of each leading singular vector with the base's; intruders are marked."""
    examined = max(len(layer.cosine) for layer in found.layers.values())
    cosines, crosses = [], []
    for row, layer in enumerate(found.layers.values()):
        known = layer.cosine.tolist()
        cosines.append(known + [math.nan] * (examined - len(known)))
        crosses += [(row, j) for j, intruder in enumerate(layer.is_intruder.tolist()) if intruder]
    chart = heat_map(
        "Largest cosine with a base vector",
        cosines,
        x="singular vector",
        y="",
        value="cosine",
        names=list(found.layers),
        crosses=crosses,
    )
    caption = (
        "Each leading singular vector of the adapted weights beside the base's vector most like it. Crosses mark "
        "those that match none: directions that the base did not have."
    )
    return Figure(caption=caption, charts=(chart,), name="intruders")


def diff_figure(found: AdapterDiff) -> Figure:
    """How far each matrix moved, relative to what it was, and the angle of its turn."""
    names, layers = list(found.layers), list(found.layers.values())
    distance = dot_chart(
        "Distance",
        names,
        {"distance": [one.distance for one in layers]},
        x="‖ΔW₂-ΔW₁‖ (Frobenius norm)",
        zero=True,
    )
    turned = [math.nan if one.angle is None else one.angle for one in layers]
    angle = dot_chart(
        "Angle between ΔW₁ and ΔW₂",
        names,
        {"angle": turned},
        x="degrees",
        zero=True,
        first_colour=1,
    )
    caption = (
        "How far the change of each matrix moved, and how far it turned. 90 degrees share nothing."
    )
    return Figure(caption=caption, charts=(distance, angle), name="diff")


def drift_figure(found: Drift) -> Figure:
    """Distribution of the divergence over the predictions."""
    values = torch.tensor([kl for text in found.texts for kl in text.kl])
    floor = 1e-4
    edges = torch.logspace(
        -4, max(1.0, math.ceil(math.log10(float(values.max()) + floor))), 50, dtype=torch.float64
    )
    inside = values.double().clamp(min=edges[0].item(), max=edges[-1].item())
    counts = torch.histogram(inside, edges).hist
    chart = histogram(
        "Divergence of the predictions",
        edges.tolist(),
        [int(count) for count in counts],
        x="KL(base ‖ adapted) of a prediction, in nats",
        y="predictions",
        marks=[Mark(at=max(found.kl, floor), text=f"mean {found.kl:.3g}")],
    )
    caption = "The first bar holds all divergences below it."
    return Figure(caption=caption, charts=(chart,), name="drift")


def spread(layers: Mapping[str, Any], most: int = PANELS) -> dict[str, Any]:
    """A few of the matrices, from the first to the last at equal distances."""
    names = list(layers)
    count = min(most, len(names))
    places = {round(i * (len(names) - 1) / max(count - 1, 1)) for i in range(count)}
    return {names[place]: layers[names[place]] for place in sorted(places)}


def _families(layers: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The matrices by kind: those whose names differ by the number of their block alone."""
    found: dict[str, dict[str, Any]] = {}
    for name, layer in layers.items():
        found.setdefault(family(name), {})[name] = layer
    return list(found.values())


def _rows_spread(phi: Tensor) -> Tensor:
    """At most `LARGEST` rows, at equal distances: the base has hundreds of directions."""
    rows = phi.shape[0]
    if rows <= LARGEST:
        return phi
    return phi[[(k + 1) * rows // LARGEST - 1 for k in range(LARGEST)]]


def _map(
    title: str,
    phi: Tensor,
    largest: float,
    *,
    x: str = "j, second adapter",
    y: str = "i, first adapter",
    legend: bool,
) -> Chart:
    return heat_map(title, phi.tolist(), x=x, y=y, value="φ", domain=(0.0, largest), legend=legend)
