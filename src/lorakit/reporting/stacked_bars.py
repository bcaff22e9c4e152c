"""Stacked bar charts."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lorakit.formatting import percentage
from lorakit.reporting.axes import (
    GRID,
    LONGEST_BAR_NAME,
    VALUE_TEXT,
    Spec,
    bar_length,
    bar_name,
    legend_columns,
    name_width,
    nominal,
)
from lorakit.reporting.charts import SERIES, WIDTH, Chart


def stacked_bar_chart(
    title: str,
    bars: Mapping[str, Mapping[str, float]],
    *,
    shown: Callable[[float], str],
) -> Chart:
    """Return horizontal stacked bars, each followed by its sum.

    Args:
        title: Title of the chart.
        bars: The parts of each bar by name, in drawing order. At most as many parts as `SERIES` has colours; a part
            that is 0 in every bar is left out.
        shown: Formats a number.
    """
    parts = list(dict.fromkeys(part for bar in bars.values() for part, size in bar.items() if size))
    assert len(parts) <= len(SERIES), parts
    values, sums, descriptions = [], [], []
    for name, bar in bars.items():
        total, end = sum(bar.values()), 0.0
        for part in parts:
            size = bar.get(part, 0)
            if size:
                label = f"{name}, {part}: {shown(size)} ({percentage(size, total)})"
                values.append(
                    {"bar": name, "part": part, "from": end, "to": end + size, "label": label}
                )
            end += size
        sums.append({"bar": name, "to": end, "text": shown(total)})
        sizes = ", ".join(f"{part} {shown(bar[part])}" for part in parts if bar.get(part))
        descriptions.append(f"{name} {shown(total)} ({sizes})")
    row = bar_name("bar", bars)
    longest = max((one["to"] for one in sums), default=1)
    texts = [one["text"] for one in sums]

    def length(field: str) -> Spec:
        return bar_length(field, longest, names=bars, texts=texts)

    square = {"symbolType": "square", "symbolStrokeWidth": 0}
    colour = nominal(
        "part",
        scale={"domain": parts, "range": list(SERIES[: len(parts)])},
        legend={**legend_columns(parts, left=name_width(bars, LONGEST_BAR_NAME)), **square},
    )
    spec: Spec = {
        "width": WIDTH,
        "height": {"step": 40},
        "layer": [
            {
                "data": {"values": values},
                # The stroke separates neighbours whose colours look the same to some readers.
                "mark": {"type": "bar", "height": {"band": 0.6}, "stroke": GRID, "strokeWidth": 1},
                "encoding": {
                    "y": row,
                    "x": length("from"),
                    "x2": {"field": "to"},
                    "color": colour,
                    "description": {"field": "label"},
                },
            },
            {
                "data": {"values": sums},
                "mark": VALUE_TEXT,
                "encoding": {"y": row, "x": length("to"), "text": {"field": "text"}},
            },
        ],
    }
    return Chart(title=title, alt=f"{title}: {'; '.join(descriptions)}.", spec=spec)
