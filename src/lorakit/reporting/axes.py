"""Parts that charts share: axes of named rows, axes of cells, marker lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

Spec = dict[str, Any]

INK, MUTED, GRID = "#1f2933", "#52606d", "#e1e6eb"

VALUE_TEXT: Spec = dict(type="text", align="left", dx=5, color=INK, fontSize=11, aria=False)
"""The mark of a number at the end of a bar."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A labelled line across a chart at one value."""

    at: float
    text: str
    axis: Literal["x", "y"] = "x"


def quantitative(field: str, **options: Any) -> Spec:
    """Return the encoding of a number."""
    return {"field": field, "type": "quantitative", **options}


def nominal(field: str, **options: Any) -> Spec:
    """Return the encoding of a name."""
    return {"field": field, "type": "nominal", **options}


def bar_name(field: str) -> Spec:
    """Return the y encoding of horizontal bars, in the order of the data."""
    axis = {"title": None, "ticks": False, "domain": False, "labelLimit": 140}
    return nominal(field, sort=None, axis=axis)


def bar_length(field: str, longest: float, title: str | None = None) -> Spec:
    """Return the x encoding of horizontal bars, with room for a number after the longest."""
    axis = {"title": title, "grid": False, "labels": False, "ticks": False, "domain": False}
    return quantitative(field, axis=axis, scale={"domain": [0, 1.3 * longest], "nice": False})


def short_names(names: Sequence[str]) -> list[str]:
    """Return dotted paths without their common leading components."""
    if len(names) < 2:
        return list(names)
    paths = [name.split(".") for name in names]
    parents = zip(*(path[:-1] for path in paths), strict=False)
    shared = len(list(takewhile(lambda parts: len(set(parts)) == 1, parents)))
    return [".".join(path[shared:]) for path in paths]


def mark_layers(mark: Mark, *, left_of: bool = False) -> list[Spec]:
    """Return layers for a mark's line and its text, which is right of the line or left of it."""
    data = {"values": [{"at": mark.at, "text": mark.text}]}
    place: Spec = {mark.axis: quantitative("at")}
    rule = {"type": "rule", "strokeDash": [4, 3], "color": MUTED, "aria": False}
    text = {"type": "text", "color": MUTED, "fontSize": 11, "align": "left", "aria": False}
    if mark.axis == "x":
        text_place = {**place, "y": {"value": 8}}
        text |= {"dx": -4, "align": "right"} if left_of else {"dx": 4}
    else:
        text_place = {**place, "x": {"value": 4}}
        text |= {"dy": -6}
    return [
        {"data": data, "mark": rule, "encoding": place},
        {"data": data, "mark": text, "encoding": {**text_place, "text": {"field": "text"}}},
    ]


def row_axis(labels: Sequence[str]) -> Spec:
    """Return an axis of rows from the top down; labels that would overlap are left out."""
    return {
        "field": "row",
        "type": "ordinal",
        "scale": {"domain": list(range(len(labels)))},
        "axis": {
            "title": None,
            "labelExpr": _lookup(labels),
            "labelLimit": 190,
            "labelOverlap": "greedy",
            "labelFontSize": 9,
            "ticks": False,
            "grid": False,
            "domain": False,
        },
    }


def _lookup(labels: Sequence[str]) -> str:
    # Rows are numbered and look up their labels: two rows may have the same label.
    quoted = ("'" + "".join(c for c in label if c not in "'\\\n\r") + "'" for label in labels)
    return f"[{', '.join(quoted)}][datum.value]"


def rows_height(count: int) -> int:
    """Return the height of `count` rows in pixels."""
    return max(60, count * max(3, min(16, 640 // max(count, 1))))


def between(field: str, count: int, axis: Spec, *, reverse: bool = False) -> dict[str, Spec]:
    """Return the encoding of cells that are centred on the integers 1 to `count`."""
    channel = "y" if reverse else "x"
    # Vega draws no ticks for a descending domain, so a flag reverses it.
    scale = {"domain": [0.5, count + 0.5], "reverse": reverse, "nice": False, "zero": False}
    return {
        channel: quantitative(f"{field}_from", scale=scale, axis=axis),
        f"{channel}2": {"field": f"{field}_to"},
    }


def edges(field: str) -> list[Spec]:
    """Return the transforms that compute the fields of `between`."""
    return [
        {"calculate": f"datum.{field} - 0.5", "as": f"{field}_from"},
        {"calculate": f"datum.{field} + 0.5", "as": f"{field}_to"},
    ]
