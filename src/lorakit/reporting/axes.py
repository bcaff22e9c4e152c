"""Parts that charts share: rows with names, cells around numbers, lines at values worth knowing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Spec = dict[str, Any]

INK, MUTED, GRID = "#1f2933", "#52606d", "#e1e6eb"


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A line across a chart at a value worth knowing."""

    at: float
    text: str
    axis: Literal["x", "y"] = "x"


def short_names(names: Sequence[str]) -> list[str]:
    """Paths without the components that all of them begin with."""
    if len(names) < 2:
        return list(names)
    paths = [name.split(".") for name in names]
    shared = 0
    for parts in zip(*(path[:-1] for path in paths), strict=False):
        if len(set(parts)) > 1:
            break
        shared += 1
    return [".".join(path[shared:]) for path in paths]


def mark_layers(mark: Mark, *, left_of: bool = False) -> list[Spec]:
    """The line of a mark, and its text, to the right of it or to the left."""
    data = {"values": [{"at": mark.at, "text": mark.text}]}
    place: Spec = {mark.axis: {"field": "at", "type": "quantitative"}}
    rule = {"type": "rule", "strokeDash": [4, 3], "color": MUTED, "aria": False}
    text = {"type": "text", "color": MUTED, "fontSize": 11, "align": "left", "aria": False}
    if mark.axis == "x":
        beside = {**place, "y": {"value": 8}}
        text |= {"dx": -4, "align": "right"} if left_of else {"dx": 4}
    else:
        beside = {**place, "x": {"value": 4}}
        text |= {"dy": -6}
    return [
        {"data": data, "mark": rule, "encoding": place},
        {"data": data, "mark": text, "encoding": {**beside, "text": {"field": "text"}}},
    ]


def row_axis(labels: Sequence[str]) -> Spec:
    """Rows from the top down, as many named as can be read."""
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
    # Rows are numbers and their labels a list: two rows with one name stay two.
    quoted = ("'" + "".join(c for c in label if c not in "'\\\n\r") + "'" for label in labels)
    return f"[{', '.join(quoted)}][datum.value]"


def rows_height(count: int) -> int:
    """Pixels for so many rows."""
    return max(60, count * max(3, min(16, 640 // max(count, 1))))


def between(field: str, count: int, axis: Spec, *, reverse: bool = False) -> dict[str, Spec]:
    """Cells from half below to half above their number, on an axis that shows the numbers."""
    channel = "y" if reverse else "x"
    # Reversed by a flag: of a domain from high to low Vega shows no ticks.
    scale = {"domain": [0.5, count + 0.5], "reverse": reverse, "nice": False, "zero": False}
    return {
        channel: {
            "field": f"{field}_from",
            "type": "quantitative",
            "scale": scale,
            "axis": axis,
        },
        f"{channel}2": {"field": f"{field}_to"},
    }


def edges(field: str) -> list[Spec]:
    """The transforms behind `between`."""
    return [
        {"calculate": f"datum.{field} - 0.5", "as": f"{field}_from"},
        {"calculate": f"datum.{field} + 0.5", "as": f"{field}_to"},
    ]
