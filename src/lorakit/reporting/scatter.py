"""Scatter charts with error bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lorakit.formatting import number
from lorakit.reporting.axes import Spec, legend_columns, nominal, quantitative
from lorakit.reporting.charts import (
    HEIGHT,
    SHAPES,
    WIDTH,
    Chart,
    colour_of,
    cue_of,
    in_words,
)


@dataclass(frozen=True, kw_only=True)
class Point:
    """A point of a scatter chart."""

    series: str
    x: float
    y: float
    name: str
    spread: float = 0.0
    """Half the length of the error bar."""
    hollow: bool = False
    """Draw an outline only, for points to compare with."""


def scatter_chart(
    title: str,
    points: Sequence[Point],
    *,
    series: Sequence[str],
    x: str,
    y: str,
    legend: bool = True,
) -> Chart:
    """Return points over a logarithmic x axis.

    `series` names the series of all charts of a figure, so that a series has one colour in all of them.
    """
    shown = [one for one in points if one.x > 0 and math.isfinite(one.y)]
    values = [
        {
            "series": one.series,
            "x": one.x,
            "y": one.y,
            "low": one.y - one.spread,
            "high": one.y + one.spread,
            "label": f"{one.name}, {x} {one.x:,.0f}: {y} {number(one.y)}"
            + (f" ± {number(one.spread)}" if one.spread else ""),
            "hollow": one.hollow,
        }
        for one in shown
    ]
    names = list(series)
    colours = [colour_of(i) for i in range(len(names))]
    shapes = [cue_of(i, SHAPES) for i in range(len(names))]
    # The layers share a legend: one layer without it removes it from all.
    shared = legend_columns(names) if legend else None
    colour = nominal("series", legend=shared, scale={"domain": names, "range": colours})
    shape = nominal("series", legend=shared, scale={"domain": names, "range": shapes})
    x_axis = {"title": x, "tickCount": 5, "format": "~s", "grid": False}
    y_axis = {"title": None, "tickCount": 5, "minExtent": 38}
    place: Spec = {
        "x": quantitative("x", scale={"type": "log"}, axis=x_axis),
        "y": quantitative("y", scale={"zero": False}, axis=y_axis),
    }
    described = {"description": {"field": "label"}}
    spec = {
        "width": WIDTH,
        "height": HEIGHT,
        "data": {"values": values},
        "layer": [
            {
                "transform": [{"filter": "datum.high > datum.low"}],
                "mark": {"type": "rule", "aria": False},
                "encoding": {
                    "x": place["x"],
                    "y": {**place["y"], "field": "low"},
                    "y2": {"field": "high"},
                    "color": colour,
                },
            },
            *(
                {
                    "transform": [{"filter": test}],
                    "mark": {"type": "point", "size": 60, "opacity": 1, "filled": filled},
                    "encoding": {**place, "color": colour, "shape": shape, **described},
                }
                for test, filled in (("datum.hollow", False), ("!datum.hollow", True))
            ),
        ],
    }
    alt = f"{title}: {y} over {x}, {len(shown)} points, {in_words([one.y for one in shown])}."
    return Chart(title=title, alt=alt, spec=spec)
