"""Charts as Vega-Lite specifications: lines, dots, bars, histograms and heat maps.

`lorakit.reporting.drawing` renders a chart as SVG for a page or as a file for a paper. Every mark has its numbers
as text, which the page shows on hover.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np

from lorakit.formatting import number, number_range
from lorakit.reporting.axes import (
    LINE,
    LONGEST_ROW_NAME,
    VALUE_TEXT,
    Mark,
    Spec,
    bar_length,
    bar_name,
    labelled,
    legend_columns,
    mark_layers,
    name_width,
    nominal,
    quantitative,
    row_axis,
    rows_height,
    short_names,
    whole_axis,
)

Cue = TypeVar("Cue")

SERIES = ("#0072b2", "#d55e00", "#00805f", "#8e4a9e", "#9a6a00", "#5b6b7b")
"""Colours of series, distinguishable with any colour vision; the first three are from Okabe and Ito."""
DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [4, 1], [1, 3])
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")
"""Dash patterns and shapes of series: colour is never the only cue."""

WIDTH, HEIGHT = 310, 180
"""Size of a chart's plot in a picture, in pixels. In a page, the chart with its axes is `axes.OUTER` wide."""
MOST_POINTS = 240
"""Most points drawn of a line; more would be denser than pixels."""
FAINT = 0.35
"""Opacity of a faint line."""
LONGEST_NAME = 36
"""Most characters of a name in a legend or on an axis."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One chart, with a description for screen readers."""

    title: str
    alt: str
    """A sentence that describes the chart, with its main numbers."""
    spec: Spec = field(repr=False)
    """A Vega-Lite view without title and configuration."""
    fixed: bool = False
    """Keep the width of the plot, instead of fitting the chart to the width of others in a page."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Charts with a common caption."""

    caption: str
    charts: tuple[Chart, ...]
    columns: int = 2
    """Charts in a row when the figure is saved as one picture."""
    name: str = ""
    """File name for `Page.save_figures`, without number and suffix."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line of points (x, y)."""

    name: str
    points: Sequence[tuple[float, float]]
    faint: bool = False
    """Draw a thin, pale line, for raw values behind their mean."""
    dots: bool = False
    """Draw every point."""
    colour: int | None = None
    """Number of the colour and dash pattern; by default the position among the series."""

    def finite(self) -> list[tuple[float, float]]:
        """Return the points with finite coordinates."""
        return [(x, y) for x, y in self.points if math.isfinite(x) and math.isfinite(y)]


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x: str,
    y: str,
    marks: Sequence[Mark] = (),
    y_domain: tuple[float, float] | None = None,
    y_format: str | None = None,
) -> Chart:
    """Return lines over x. The y axis starts at the data, not at 0; the chart's title names it."""
    shown = [one for one in series if one.finite()]
    chosen = {one.name: i if one.colour is None else one.colour for i, one in enumerate(shown)}
    data_scale = {"zero": False, "nice": True, "type": "linear"}
    scale = data_scale if y_domain is None else {"domain": list(y_domain)}
    axis: Spec = {"title": None, "tickCount": 5, "minExtent": 38}
    ys = {b for one in shown for _, b in one.finite()}
    if y_format is None and len(ys) == 1:
        # Vega chooses the decimals of labels by the distance of ticks, and here there is one tick.
        axis |= {"values": list(ys), "labelExpr": f"'{number(*ys)}'"}
    if y_format is not None:
        axis["labelExpr"] = f"datum.value == 0 ? '0' : format(datum.value, '{y_format}')"
    names = shortened(one.name for one in shown)
    xs = [a for one in shown for a, _ in one.finite()]
    x_axis = whole_axis(x, min(xs, default=0), max(xs, default=0)) | {"tickCount": 6}
    place = {
        "x": quantitative("x", axis=x_axis, scale={"zero": False, "nice": False}),
        "y": quantitative("y", axis=axis, scale=scale),
    }

    def by_series(style: Callable[[int], Any], legend: Spec | None) -> Spec:
        styles = [style(chosen[name]) for name in names]
        scale = {"domain": [*names.values()], "range": styles}
        return nominal("series", scale=scale, legend=legend)

    faint = [i for i, one in enumerate(shown) if one.faint]
    legend = {
        **legend_columns(names.values()),
        "symbolType": "stroke",
        "offset": 6 + LINE * len(labelled(marks)),
        "symbolOpacity": {"expr": f"indexof({faint}, datum.index) < 0 ? 1 : {FAINT}"},
    }
    colour = by_series(colour_of, legend if len(shown) > 1 else None)
    dash = by_series(partial(cue_of, cues=DASHES), None)
    layers: list[Spec] = []
    for one in shown:
        points = thinned(one.finite())
        values = [
            {
                "x": a,
                "y": b,
                "series": names[one.name],
                "label": f"{one.name}, {x} {a:g}: {number(b)}",
            }
            for a, b in points
        ]
        data = {"values": values}
        thin = {"strokeWidth": 1, "opacity": FAINT} if one.faint else {"strokeWidth": 2}
        line = {"type": "line", "aria": False, "interpolate": "linear", **thin}
        layers.append(
            {"data": data, "mark": line, "encoding": {**place, "color": colour, "strokeDash": dash}}
        )
        dot = {"type": "point", "filled": True, "size": 36, "opacity": 1.0 if one.dots else 0.0}
        encoding = {**place, "color": colour, "description": {"field": "label"}}
        layers.append({"data": data, "mark": dot, "encoding": encoding})
    if marks and shown:
        layers += mark_layers(marks, middle=(min(xs) + max(xs)) / 2)
    spec = {"width": WIDTH, "height": HEIGHT, "layer": layers}
    return Chart(title=title, alt=_line_alt(title, shown, x, y), spec=spec)


def dot_chart(
    title: str,
    names: Sequence[str],
    series: Mapping[str, Sequence[float]],
    *,
    x: str,
    log: bool = False,
    zero: bool = False,
    first_colour: int = 0,
) -> Chart:
    """Return a row for each name, with a dot for each series."""
    labels = short_names(names)
    colours = [colour_of(first_colour + i) for i in range(len(series))]
    values = [
        {"row": i, "x": value, "series": name, "label": f"{names[i]}, {name}: {number(value)}"}
        for name, numbers in series.items()
        for i, value in enumerate(numbers)
        if math.isfinite(value) and not (log and value <= 0)
    ]
    domain, shapes = list(series), [cue_of(i, SHAPES) for i in range(len(series))]
    left = name_width(labels, LONGEST_ROW_NAME)
    legend = legend_columns(series, left=left) if len(series) > 1 else None
    spec: Spec = {
        "width": WIDTH,
        "height": rows_height(len(names)),
        "data": {"values": values},
        "mark": {"type": "point", "filled": True, "size": 28, "opacity": 1},
        "encoding": {
            "x": quantitative(
                "x",
                scale={"type": "log"} if log else {"zero": zero},
                axis={"title": x, "tickCount": 5, "format": "~g"},
            ),
            "y": row_axis(labels),
            "color": nominal("series", scale={"domain": domain, "range": colours}, legend=legend),
            "shape": nominal("series", scale={"domain": domain, "range": shapes}),
            "description": {"field": "label"},
        },
    }
    alt = f"{title}: {x} of {len(names)} rows. " + " ".join(
        f"{name}: {in_words(numbers)}." for name, numbers in series.items()
    )
    return Chart(title=title, alt=alt, spec=spec)


def bar_chart(
    title: str, bars: Mapping[str, float], *, x: str, texts: Mapping[str, str] | None = None
) -> Chart:
    """Return horizontal bars from 0, each followed by its value."""
    shown = {name: (texts or {}).get(name, number(value)) for name, value in bars.items()}
    names = shortened(bars)
    values = [
        {"name": names[name], "x": value, "text": shown[name], "label": f"{name}: {shown[name]}"}
        for name, value in bars.items()
    ]
    longest = max(bars.values(), default=1) or 1
    length = bar_length("x", longest, x, names=names.values(), texts=shown.values())
    place = {"y": bar_name("name", names.values()), "x": length}
    spec = {
        "width": WIDTH,
        "height": {"step": 30},
        "data": {"values": values},
        "layer": [
            {
                "mark": {"type": "bar", "color": SERIES[0], "height": {"band": 0.6}},
                "encoding": {**place, "description": {"field": "label"}},
            },
            {"mark": VALUE_TEXT, "encoding": {**place, "text": {"field": "text"}}},
        ],
    }
    alt = f"{title}: " + "; ".join(f"{name} {text}" for name, text in shown.items()) + "."
    return Chart(title=title, alt=alt, spec=spec)


def histogram(
    title: str, edges: Sequence[float], counts: Sequence[int], *, x: str, y: str, marks=()
) -> Chart:
    """Return a histogram with a logarithmic x axis; there is one more edge than counts."""
    values = [
        {
            "from": low,
            "to": high,
            "count": count,
            "label": f"{number(low)} to {number(high)}: {count:,} {y}",
        }
        for low, high, count in zip(edges, edges[1:], counts, strict=False)
        if count
    ]
    scale = {"type": "log", "domain": [edges[0], edges[-1]], "nice": False}
    x_axis = {"title": x, "tickCount": 6, "format": "~g", "grid": False}
    spec = {
        "width": WIDTH,
        "height": HEIGHT,
        "layer": [
            {
                "data": {"values": values},
                "mark": {"type": "bar", "color": SERIES[0], "binSpacing": 1},
                "encoding": {
                    "x": quantitative("from", scale=scale, axis=x_axis, bin={"binned": True}),
                    "x2": {"field": "to"},
                    "y": quantitative("count", axis={"title": y, "tickCount": 5}),
                    "description": {"field": "label"},
                },
            },
            *mark_layers(marks, middle=math.sqrt(edges[0] * edges[-1])),
        ],
    }
    total = sum(counts)
    alt = f"{title}: {total:,} {y} by {x}. " + " ".join(f"{mark.text}." for mark in marks)
    return Chart(title=title, alt=alt, spec=spec)


def colour_of(number: int) -> str:
    """Return the colour of a series."""
    return SERIES[number % len(SERIES)]


def cue_of(number: int, cues: Sequence[Cue]) -> Cue:
    """Return the dash pattern or the shape of a series.

    The cues shift in each round of the colours, so that no two of 36 series have both the same colour and the same cue.
    """
    return cues[(number + number // len(SERIES)) % len(cues)]


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most `MOST_POINTS` points of a line, without losing its peaks.

    Each stretch of the line keeps its ends, its least and its greatest point.
    """
    if len(points) <= MOST_POINTS:
        return list(points)
    stretches = MOST_POINTS // 4
    indices: set[int] = set()
    for k in range(stretches):
        part = range(k * len(points) // stretches, (k + 1) * len(points) // stretches)
        least = min(part, key=lambda i: points[i][1])
        greatest = max(part, key=lambda i: points[i][1])
        indices |= {part[0], part[-1], least, greatest}
    return [points[i] for i in sorted(indices)]


def running_mean(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Return the mean of each value and the `window` - 1 values before it, or fewer at the start."""
    values = np.array([y for _, y in points])
    # A running sum would keep the rounding error of one huge value.
    return [
        (x, float(values[max(0, i + 1 - window) : i + 1].mean())) for i, (x, _) in enumerate(points)
    ]


# --- in words --------------------------------------------------------------------------------------


def shortened(names: Iterable[str]) -> dict[str, str]:
    """Cut names in the middle to `LONGEST_NAME` characters; number those that become equal to another."""
    labels: dict[str, str] = {}
    for position, name in enumerate(dict.fromkeys(names), 1):
        half = LONGEST_NAME // 2
        short = name if len(name) <= LONGEST_NAME else f"{name[: half - 1]}…{name[-half:]}"
        labels[name] = f"{position}: {short}" if short in labels.values() else short
    return labels


def in_words(numbers: Sequence[float]) -> str:
    """Return the range of the finite numbers as text."""
    finite = [value for value in numbers if math.isfinite(value)]
    return number_range(finite) if finite else "no values"


def _line_alt(title: str, series: Sequence[Series], x: str, y: str) -> str:
    parts = []
    for one in series:
        (x0, y0), (x1, y1) = one.finite()[0], one.finite()[-1]
        parts.append(
            f"{one.name} goes from {number(y0)} at {x} {x0:g} to {number(y1)} at {x} {x1:g}."
        )
    return f"{title}: {y} over {x}. {' '.join(parts)}"
