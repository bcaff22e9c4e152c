"""Parts that charts share: axes of named rows, axes of cells, marker lines."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

from lorakit.formatting import visible

Spec = dict[str, Any]

INK, MUTED, GRID = "#1f2933", "#52606d", "#e1e6eb"

FONT_SIZE = 11
"""Size of every text in a chart but its title, in pixels of the chart."""
CHARACTER = 6.4
"""Width of a character at that size, in pixels; most characters are narrower."""
LINE = 14
"""Height of a line of text at that size, in pixels."""
LONGEST_BAR_NAME, LONGEST_ROW_NAME = 140, 190
"""Width at which names on an axis are cut, in pixels."""
OUTER = 352
"""Width of a chart in a page with its axes, in pixels: that of a phone's screen without its margins."""
MOST_INTEGERS = 5
"""Most integers of an axis that get a tick each."""

VALUE_TEXT: Spec = dict(type="text", align="left", dx=5, color=INK, fontSize=FONT_SIZE, aria=False)
"""The mark of a number at the end of a bar."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A line across a chart at one value."""

    at: float
    text: str = ""
    """Label above the chart; only a mark on the x axis has one."""
    axis: Literal["x", "y"] = "x"


def quantitative(field: str, **options: Any) -> Spec:
    """Return the encoding of a number."""
    return {"field": field, "type": "quantitative", **options}


def nominal(field: str, **options: Any) -> Spec:
    """Return the encoding of a name."""
    return {"field": field, "type": "nominal", **options}


def whole_axis(title: str, low: float, high: float) -> Spec:
    """Return an axis that labels integers, each if they are few, where Vega would also label halves."""
    axis = {"title": title, "grid": False, "tickMinStep": 1, "tickCount": 5}
    integers = range(math.ceil(low), math.floor(high) + 1)
    few = {"values": list(integers), "format": "d"} if len(integers) <= MOST_INTEGERS else {}
    return axis | few


def bar_name(field: str, names: Iterable[str]) -> Spec:
    """Return the y encoding of horizontal bars, in the order of the data."""
    width = name_width(names, LONGEST_BAR_NAME)
    axis = {"title": None, "ticks": False, "domain": False, "minExtent": width}
    axis["labelLimit"] = LONGEST_BAR_NAME
    return nominal(field, sort=None, axis=axis)


def bar_length(
    field: str,
    longest: float,
    title: str | None = None,
    *,
    names: Iterable[str],
    texts: Iterable[str],
) -> Spec:
    """Return the x encoding of horizontal bars, with room for the longest of `texts` after the longest bar."""
    axis = {"title": title, "grid": False, "labels": False, "ticks": False, "domain": False}
    plot = OUTER - name_width(names, LONGEST_BAR_NAME) - LINE
    room = min(CHARACTER * max(map(len, texts), default=0) + LINE, plot / 2)
    domain = [0, longest * plot / (plot - room)]
    return quantitative(field, axis=axis, scale={"domain": domain, "nice": False})


def legend_columns(names: Iterable[str], *, left: float = 3 * LINE) -> Spec:
    """Return the columns of a legend: as many as fit beside each other, `left` pixels from the chart's left."""
    entry = CHARACTER * max(map(len, names), default=0) + 2.5 * LINE  # with its symbol
    return {"columns": max(1, int((OUTER - left) // entry)), "columnPadding": LINE}


def name_width(names: Iterable[str], most: int) -> float:
    """Return the width of the longest name, at most `most`, in a font as wide as that of any reader."""
    return min(most, CHARACTER * max(map(len, names), default=0))


def short_names(names: Sequence[str]) -> list[str]:
    """Return dotted paths without their common leading components."""
    if len(names) < 2:
        return list(names)
    paths = [name.split(".") for name in names]
    parents = zip(*(path[:-1] for path in paths), strict=False)
    shared = len(list(takewhile(lambda parts: len(set(parts)) == 1, parents)))
    return [".".join(path[shared:]) for path in paths]


def mark_layers(marks: Sequence[Mark], *, middle: float) -> list[Spec]:
    """Return layers for the lines of marks, and for their texts in the margin above the plot, where no curve is.

    Each text has a row of its own. It is right of its line, or left of it where the line is right of `middle`.
    """
    layers: list[Spec] = []
    for mark in marks:
        data = {"values": [{"at": mark.at}]}
        place: Spec = {mark.axis: quantitative("at")}
        rule = {"type": "rule", "strokeDash": [4, 3], "color": MUTED, "aria": False}
        layers.append({"data": data, "mark": rule, "encoding": place})
    for row, mark in enumerate(labelled(marks)):
        data = {"values": [{"at": mark.at, "text": mark.text}]}
        align = "right" if mark.at > middle else "left"
        text = {
            "type": "text",
            "color": MUTED,
            "fontSize": FONT_SIZE,
            "align": align,
            "aria": False,
        }
        place = {"x": quantitative("at"), "y": {"value": -LINE * (row + 0.5)}}
        layers.append(
            {"data": data, "mark": text, "encoding": {**place, "text": {"field": "text"}}}
        )
    return layers


def labelled(marks: Sequence[Mark]) -> list[Mark]:
    """Return the marks that have a text."""
    assert all(mark.axis == "x" for mark in marks if mark.text), marks
    return [mark for mark in marks if mark.text]


def row_axis(labels: Sequence[str]) -> Spec:
    """Return an axis of rows from the top down; labels that would overlap are left out."""
    return {
        "field": "row",
        "type": "ordinal",
        "scale": {"domain": list(range(len(labels)))},
        "axis": {
            "title": None,
            # Rows are numbered and look up their labels: two rows may have the same label.
            "labelExpr": f"{json.dumps([visible(label) for label in labels])}[datum.value]",
            "labelLimit": LONGEST_ROW_NAME,
            "minExtent": name_width(labels, LONGEST_ROW_NAME),
            "labelOverlap": "greedy",
            "ticks": False,
            "grid": False,
            "domain": False,
        },
    }


def rows_height(count: int) -> int:
    """Return the height of `count` rows in pixels."""
    return max(60, count * max(3, min(16, 640 // max(count, 1))))


def between(field: str, count: int, title: str, *, reverse: bool = False) -> dict[str, Spec]:
    """Return the encoding of cells that are centred on the integers 1 to `count`, from `field`_from to `field`_to."""
    channel = "y" if reverse else "x"
    # Vega draws no ticks for a descending domain, so a flag reverses it.
    scale = {"domain": [0.5, count + 0.5], "reverse": reverse, "nice": False, "zero": False}
    return {
        channel: quantitative(f"{field}_from", scale=scale, axis=whole_axis(title, 1, count)),
        f"{channel}2": {"field": f"{field}_to"},
    }
