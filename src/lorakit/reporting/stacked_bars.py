"""Stacked bars: what wholes are made of, beside each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lorakit.reporting.axes import GRID, INK, Spec
from lorakit.reporting.charts import SERIES, WIDTH, Chart


def stacked_bar_chart(
    title: str,
    bars: Mapping[str, Mapping[str, float]],
    *,
    shown: Callable[[float], str],
) -> Chart:
    """A horizontal bar for each whole, its parts one after another from 0, the sum behind the last.

    Args:
        title: What it shows.
        bars: The parts of each whole by their names, in the order in which they stand. At most as many parts as there
            are colours; one that is 0 everywhere is left out.
        shown: How a number is written.
    """
    parts = list(
        dict.fromkeys(part for whole in bars.values() for part, size in whole.items() if size)
    )
    assert len(parts) <= len(SERIES), parts
    values, sums, words = [], [], []
    for name, whole in bars.items():
        total, end = sum(whole.values()), 0.0
        for part in parts:
            size = whole.get(part, 0)
            if size:
                label = f"{name}, {part}: {shown(size)} ({size / total:.1%})"
                values.append(
                    {"bar": name, "part": part, "from": end, "to": end + size, "label": label}
                )
            end += size
        sums.append({"bar": name, "to": end, "text": shown(total)})
        of = ", ".join(f"{part} {shown(whole[part])}" for part in parts if whole.get(part))
        words.append(f"{name} {shown(total)} ({of})")
    row = {
        "field": "bar",
        "type": "nominal",
        "sort": None,
        "axis": {"title": None, "ticks": False, "domain": False, "labelLimit": 140},
    }
    # Room for the sum at the end of the longest bar.
    scale = {"domain": [0, 1.3 * max((one["to"] for one in sums), default=1)], "nice": False}
    hidden = {"title": None, "grid": False, "labels": False, "ticks": False, "domain": False}
    x = {"type": "quantitative", "scale": scale, "axis": hidden}
    colour = {
        "field": "part",
        "type": "nominal",
        "scale": {"domain": parts, "range": list(SERIES[: len(parts)])},
        "legend": {
            "columns": 2,
            "symbolType": "square",
            "symbolStrokeWidth": 0,
            "columnPadding": 24,
        },
    }
    number: Spec = {"type": "text", "align": "left", "dx": 5, "color": INK, "fontSize": 11}
    spec: Spec = {
        "width": WIDTH,
        "height": {"step": 40},
        "layer": [
            {
                "data": {"values": values},
                # The line of the grid's colour parts neighbours for an eye that cannot tell their colours.
                "mark": {"type": "bar", "height": {"band": 0.6}, "stroke": GRID, "strokeWidth": 1},
                "encoding": {
                    "y": row,
                    "x": {**x, "field": "from"},
                    "x2": {"field": "to"},
                    "color": colour,
                    "description": {"field": "label"},
                },
            },
            {
                "data": {"values": sums},
                "mark": {**number, "aria": False},
                "encoding": {"y": row, "x": {**x, "field": "to"}, "text": {"field": "text"}},
            },
        ],
    }
    return Chart(title=title, alt=f"{title}: {'; '.join(words)}.", spec=spec)
