"""Heat maps."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lorakit.formatting import number
from lorakit.reporting.axes import (
    Spec,
    between,
    quantitative,
    row_axis,
    rows_height,
    short_names,
)
from lorakit.reporting.charts import WIDTH, Chart, in_words

SCHEME = "cividis"
"""Vega's name of a colour scale with even steps of lightness, readable in grey and with any colour vision."""
SIDE = 190
"""Side of a map without row names, in pixels."""


def heat_map(
    title: str,
    rows: Sequence[Sequence[float]],
    *,
    x: str,
    y: str,
    value: str,
    names: Sequence[str] | None = None,
    columns: Sequence[int] | None = None,
    domain: tuple[float, float] = (0.0, 1.0),
    legend: bool = True,
    crosses: Sequence[tuple[int, int]] = (),
) -> Chart:
    """Return a heat map with numbered or named rows.

    Args:
        title: Title of the chart.
        rows: Rows of values; a NaN leaves its cell empty.
        x: Label of the columns.
        y: Label of the rows.
        value: Label of the values.
        names: Names of the rows; None numbers them from 1.
        columns: Ascending numbers of the columns; None numbers them from 1. Where numbers are left out, a cell begins
            at the column before it.
        domain: Least and greatest value of the colour scale.
        legend: Whether to draw the colour scale.
        crosses: Cells (row, column), counted from 0, to mark with a cross. They need `names`.
    """
    places = columns or range(1, max((len(row) for row in rows), default=0) + 1)
    width = max(places, default=0)
    # There may be thousands of labels: shorten "j, second adapter" to "j".
    row, column = (axis.split(",")[0] for axis in (y, x))
    row_names = names or [f"{row} {i}" for i in range(1, len(rows) + 1)]
    cells = [
        {
            "row": i,
            **({} if names else {"i_from": i + 0.5, "i_to": i + 1.5}),
            **{"j_from": before + 0.5, "j_to": j + 0.5},
            "v": v,
            "label": f"{name}, {column} {j}: {number(v)}",
        }
        for i, (name, values) in enumerate(zip(row_names, rows, strict=True))
        for before, j, v in zip((0, *places), places, values, strict=False)
        if not math.isnan(v)
    ]
    wide = max(1, round((WIDTH if names else SIDE) / max(width, 1)))
    across = between("j", width, x)
    if names:
        down: Spec = {"y": row_axis(short_names(names))}
        height = rows_height(len(rows))
    else:
        down = between("i", len(rows), y, reverse=True)
        height = max(1, round(SIDE / max(len(rows), 1))) * len(rows)
    scale = {"scheme": SCHEME, "domain": list(domain), "clamp": True}
    scale_legend = {"title": value, "orient": "bottom", "gradientLength": 180, "tickCount": 4}
    colour = quantitative("v", scale=scale, legend=scale_legend if legend else None)
    layers: list[Spec] = [
        {
            "data": {"values": cells},
            "mark": {"type": "rect"},
            "encoding": {**across, **down, "color": colour, "description": {"field": "label"}},
        }
    ]
    if crosses and names:
        marks = [{"row": i, "j": j + 1} for i, j in crosses]
        place = {"x": quantitative("j"), "y": down["y"]}
        cross = {"type": "point", "shape": "cross", "filled": True, "color": "#ffffff", "size": 20}
        layers.append(
            {"data": {"values": marks}, "mark": {**cross, "aria": False}, "encoding": place}
        )
    numbers = [cell["v"] for cell in cells]
    alt = f"{title}: heat map of {value}, {len(rows)} by {len(places)}, {in_words(numbers)}."
    spec = {"width": wide * width, "height": height, "layer": layers}
    return Chart(title=title, alt=alt, spec=spec, fixed=not names)
