"""Charts show the numbers they were built from, in every format."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest
from browser import HOSTILE

from lorakit.errors import ConfigurationError, RunFolderError
from lorakit.formatting import number
from lorakit.reporting import Figure, drawing
from lorakit.reporting.axes import OUTER, Mark, short_names
from lorakit.reporting.charts import (
    Series,
    bar_chart,
    dot_chart,
    histogram,
    line_chart,
    running_mean,
    thinned,
)
from lorakit.reporting.heat_maps import heat_map
from lorakit.reporting.scatter import Point, scatter_chart
from lorakit.reporting.stacked_bars import stacked_bar_chart


def labels(svg: str) -> list[str]:
    """Return the labels of an SVG's marks."""
    texts: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            texts.extend(value for name, value in attrs if name == "data-t")

    Reader().feed(svg)
    return texts


CURVE = [(step, 3 / step) for step in range(1, 21)]
CHARTS = {
    "line": line_chart(
        "Loss",
        [Series(name="a", points=CURVE), Series(name="b", points=CURVE[::2], dots=True)],
        x="step",
        y="loss",
        marks=[Mark(at=3, text="best"), Mark(at=1, axis="y")],
    ),
    "curve": line_chart("Loss", [Series(name="a", points=CURVE)], x="step", y="loss"),
    "dot": dot_chart(
        "Norms", ["l.0.q", "l.1.q"], {"W": [1.5, 2.5], "dW": [0.1, 0.25]}, x="norm", log=True
    ),
    "bar": bar_chart("Bytes", {"base": 1000, "adapter": 7}, x="", texts={"adapter": "seven"}),
    "stacked": stacked_bar_chart(
        "Memory",
        {"LoRA": {"base": 300, "adapter": 100, "rest": 0}, "full": {"base": 300, "adapter": 900}},
        shown=lambda value: f"{value:.0f} B",
    ),
    "histogram": histogram("KL", [0.1, 1, 10], [3, 4], x="nats", y="predictions"),
    "scatter": scatter_chart(
        "MNLI",
        [
            Point(series="LoRA", x=3e5, y=87.5, name="ours", spread=0.3),
            Point(series="FT", x=1.25e8, y=87.6, name="theirs", hollow=True),
        ],
        series=["FT", "LoRA"],
        x="parameters",
        y="accuracy",
    ),
    "cells": heat_map("phi", [[0.25, 1.0], [math.nan, 0.5]], x="j", y="i", value="phi"),
    "rows": heat_map(
        "energy", [[0.25, 1.0]], x="rank", y="", value="share", names=["q"], crosses=[(0, 1)]
    ),
}
EXPECTED = {
    "line": ["a, step 1: 3.000", "b, step 3: 1.000"],
    "curve": ["a, step 20: 0.1500"],
    "dot": ["l.0.q, W: 1.500", "l.1.q, dW: 0.2500"],
    "bar": ["base: 1,000", "adapter: seven"],
    "stacked": ["LoRA, adapter: 100 B (25.0 %)", "full, adapter: 900 B (75.0 %)"],
    "histogram": ["0.1000 to 1: 3 predictions", "1 to 10: 4 predictions"],
    "scatter": [
        "ours, parameters 300,000: accuracy 87.50 ± 0.3000",
        "theirs, parameters 125,000,000: accuracy 87.60",
    ],
    "cells": ["i 1, j 1: 0.2500", "i 2, j 2: 0.5000"],
    "rows": ["q, rank 2: 1.000"],
}


@pytest.mark.parametrize("kind", CHARTS)
def test_every_mark_carries_its_numbers(kind) -> None:
    svg = drawing.inline_svg(CHARTS[kind], 1)
    texts = labels(svg)
    assert set(EXPECTED[kind]) <= set(texts)
    assert not any("undefined" in text or "NaN" in text for text in texts)
    counts = {
        "line": 30,
        "curve": 20,
        "dot": 4,
        "bar": 2,
        "stacked": 4,
        "histogram": 2,
        "scatter": 2,
        "cells": 3,
        "rows": 2,
    }
    assert len(texts) == counts[kind]


@pytest.mark.parametrize("count", [6, 7, 12, 36])
def test_no_two_series_have_the_same_colour_and_the_same_dash_or_shape(count) -> None:
    names = [f"run {i}" for i in range(count)]
    lines = line_chart("", [Series(name=n, points=CURVE) for n in names], x="step", y="loss")
    dots = dot_chart("", ["row"], {n: [1.0] for n in names}, x="norm", first_colour=2)
    points = scatter_chart(
        "", [Point(series=n, x=1, y=1, name=n) for n in names], series=names, x="x", y="y"
    )
    for encoding, cue in (
        (lines.spec["layer"][0]["encoding"], "strokeDash"),
        (dots.spec["encoding"], "shape"),
        (points.spec["layer"][1]["encoding"], "shape"),
    ):
        scales = [encoding[channel]["scale"] for channel in ("color", cue)]
        assert all(scale["domain"] == names for scale in scales)
        styles = zip(*(map(str, scale["range"]) for scale in scales), strict=True)
        assert len(set(styles)) == count


@pytest.mark.parametrize("kind", CHARTS)
def test_a_chart_is_one_picture_to_a_screen_reader(kind) -> None:
    root = ET.fromstring(drawing.inline_svg(CHARTS[kind], 1))
    assert root.get("role") == "img"
    assert root.get("aria-label") == CHARTS[kind].alt
    inner = [part for part in root.iter() if part is not root]
    assert not any(name.startswith(("aria", "role")) for part in inner for name in part.attrib)


def test_alt_texts_hold_the_main_numbers() -> None:
    assert "a goes from 3.000 at step 1 to 0.1500 at step 20" in CHARTS["line"].alt
    assert "adapter seven" in CHARTS["bar"].alt
    assert "0.2500 to 1.000" in CHARTS["cells"].alt
    assert "LoRA 400 B (base 300 B, adapter 100 B); full 1200 B" in CHARTS["stacked"].alt


def test_line_points_lie_where_the_numbers_say() -> None:
    svg = drawing.inline_svg(CHARTS["curve"], 1)
    places = re.findall(
        r'data-t="a, step ([\d.]+): ([\d.]+)" transform="translate\(([\d.]+),([\d.]+)\)', svg
    )
    step, value, x, y = (np.array(column, float) for column in zip(*places, strict=True))
    assert len(places) == 20
    assert np.corrcoef(step, x)[0, 1] == pytest.approx(1, abs=1e-6)
    assert np.corrcoef(value, y)[0, 1] == pytest.approx(-1, abs=1e-6)


def axis_labels(chart) -> list[str]:
    root = ET.fromstring(drawing.inline_svg(chart, 1))
    groups = [part for part in root.iter() if "role-axis-label" in part.get("class", "")]
    return [text.text or "" for group in groups for text in group.iter() if text.text]


@pytest.mark.parametrize("value", [0.6838, 2.345, 87.52, -0.5, 1e-7])
@pytest.mark.parametrize("steps", [[0], [0, 40]])
def test_the_axis_of_a_constant_has_its_number(value, steps) -> None:
    series = [Series(name="a", points=[(step, value) for step in steps])]
    assert number(value) in axis_labels(line_chart("Accuracy", series, x="step", y="accuracy"))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_an_axis_of_whole_numbers_labels_no_halves(count) -> None:
    steps = [(step, 3 / step) for step in range(1, count + 1)]
    curve = line_chart("Rate", [Series(name="a", points=steps)], x="step", y="rate", y_format="~e")
    cells = [[0.5] * count] * count
    phi = heat_map("phi", cells, x="j", y="i", value="phi")
    shares = heat_map("share", cells, x="rank", y="", value="share", names=["q"] * count)
    whole = {str(rank) for rank in range(1, count + 1)}
    places = [label for label in axis_labels(curve) if "e" not in label]
    for found in (places, axis_labels(phi), set(axis_labels(shares)) - {"q"}):
        assert found
        assert set(found) <= whole


@pytest.mark.parametrize("values", [CURVE, [(a, -b) for a, b in CURVE]])
@pytest.mark.parametrize("at", [1, 2, 10, 20])
def test_no_label_of_a_mark_lies_on_a_curve_or_on_another_label(values, at) -> None:
    marks = [Mark(at=at, text="best, but worse than before"), Mark(at=at, text="another")]
    series = [Series(name=name, points=values) for name in ("one", "two")]
    svg = ET.fromstring(
        drawing.inline_svg(line_chart("Loss", series, x="step", y="y", marks=marks), 1)
    )
    boxes = []
    for part, (x, y) in placed(svg):
        if part.tag.endswith("text"):
            width, size = 6 * len(part.text or ""), float(part.get("font-size", "11px")[:-2])
            left = x - {"end": width, "middle": width / 2}.get(part.get("text-anchor", ""), 0)
            boxes.append((left, y - size, left + width, y, part.text))
    shown = {box[4] for box in boxes}
    assert {"Loss", "one", "two", "another", "best, but worse than before"} <= shown
    points = [place for part, place in placed(svg) if "data-t" in part.attrib]
    assert len(points) == 40
    for x0, y0, x1, y1, text in boxes:
        assert not [p for p in points if x0 <= p[0] <= x1 and y0 <= p[1] <= y1], text
        overlapping = [b[4] for b in boxes if b[0] < x1 and x0 < b[2] and b[1] < y1 and y0 < b[3]]
        assert overlapping == [text]


def placed(part: ET.Element, at=(0.0, 0.0)):
    """Yield every element of an SVG and its place."""
    for x, y in re.findall(r"translate\(([-\d.]+),([-\d.]+)\)", part.get("transform", "")):
        at = (at[0] + float(x), at[1] + float(y))
    yield part, at
    for child in part:
        yield from placed(child, at)


@pytest.mark.parametrize("kind", CHARTS)
def test_charts_of_a_page_have_type_of_one_size(kind) -> None:
    svg = drawing.inline_svg(CHARTS[kind], 1)
    (width,) = re.findall(r'viewBox="0 0 (\d+) ', svg)
    (share, most) = re.findall(r'style="width:([\d.]+)%;max-width:(\d+)px"', svg)[0]
    # A narrow chart has a narrow picture, so that the scale is that of a wide one.
    assert float(share) / int(width) == pytest.approx(100 / OUTER, rel=1e-3)
    assert int(most) / int(width) == pytest.approx(1.15, rel=1e-2)
    assert int(width) <= OUTER
    assert set(re.findall(r'font-size="(\d+)px"', svg)) <= {"11", "12"}
    assert svg.count('font-size="12px"') == 1  # the title


@pytest.mark.parametrize("size", [1, 8, 25, 60])
def test_a_legend_of_any_names_stays_inside_the_chart(size) -> None:
    names = [f"{i}" * size for i in range(1, 6)]
    series = [Series(name=name, points=CURVE) for name in names]
    charts = [
        line_chart("t", series, x="step", y="y"),
        dot_chart("t", ["a", "b"], {name: [1, 2] for name in names}, x="n"),
    ]
    for chart in charts:
        svg = ET.fromstring(drawing.inline_svg(chart, 1))
        digits = [(part.text or "", at) for part, at in placed(svg) if part.tag.endswith("text")]
        legend = [(text, at) for text, at in digits if set(text.replace("…", "")) <= {*text[:1]}]
        labels = [(text, x) for text, (x, y) in legend if y < 120 and len(text) >= min(size, 2)]
        assert len(labels) >= 5
        assert all(x + 6 * min(len(text), 36) <= OUTER for text, x in labels)


def test_the_legend_shows_a_faint_line_as_faint() -> None:
    series = [Series(name="step", points=CURVE, faint=True), Series(name="mean", points=CURVE)]
    svg = drawing.inline_svg(line_chart("Loss", series, x="step", y="y"), 1)
    symbols = svg.split("role-legend-symbol")[1:]
    assert ['opacity="0.35"' in one.split("</g>")[0] for one in symbols] == [True, False]


def test_a_number_after_a_bar_has_room() -> None:
    bars = {"the longest name of a bar": 2.0, "b": 1.0}
    texts = dict.fromkeys(bars, "1,234.5 thousand")
    svg = ET.fromstring(drawing.inline_svg(bar_chart("t", bars, x="", texts=texts), 1))
    ends = [at[0] for part, at in placed(svg) if part.text == "1,234.5 thousand"]
    assert len(ends) == 2
    assert max(ends) + 6 * len("1,234.5 thousand") <= OUTER


def test_rows_and_columns_of_a_heat_map_are_counted_from_its_upper_left() -> None:
    chart = heat_map(
        "phi", [[i + j for j in range(20)] for i in range(20)], x="j", y="i", value="v"
    )
    svg = drawing.inline_svg(chart, 1)
    # Both axes have tick labels.
    assert len(re.findall(r"<text [^>]*>10</text>", svg)) == 2
    places = {
        (int(i), int(j)): (float(x), float(y))
        for i, j, x, y in re.findall(r'data-t="i (\d+), j (\d+): [^"]*" d="M([\d.]+),([\d.]+)', svg)
    }
    assert places[1, 1] == (min(x for x, _ in places.values()), min(y for _, y in places.values()))
    assert places[20, 1][1] > places[1, 1][1]
    assert places[1, 20][0] > places[1, 1][0]


def test_points_of_a_scatter_chart_are_told_apart_by_a_legend() -> None:
    point = Point(series="LoRA", x=3e5, y=87.5, name="ours")
    for legend in (True, False):
        chart = scatter_chart("t", [point], series=["FT", "LoRA"], x="n", y="y", legend=legend)
        texts = re.findall(r">([^<>]+)</text>", drawing.inline_svg(chart, 1))
        assert ({"FT", "LoRA"} <= set(texts)) == legend


def test_stacked_parts_stand_one_after_another() -> None:
    svg = drawing.inline_svg(CHARTS["stacked"], 1)
    parts = re.findall(r'data-t="(\w+), (\w+): (\d+) B[^"]*" d="M([\d.]+),[\d.]+h([\d.]+)', svg)
    assert len(parts) == 4
    by_name = {(bar, part): tuple(map(float, rest)) for bar, part, *rest in parts}
    scale = {round(width / value, 2) for value, _, width in by_name.values()}
    assert len(scale) == 1  # one scale for both bars
    for bar in ("LoRA", "full"):
        (_, start, width), (_, then, _) = by_name[bar, "base"], by_name[bar, "adapter"]
        assert (start, then) == (0, pytest.approx(start + width, abs=0.05))
    assert "rest" not in svg


def test_charts_of_a_page_share_no_ids() -> None:
    ids = [
        set(re.findall(r'\bid="([^"]+)"', drawing.inline_svg(CHARTS["cells"], n))) for n in (1, 2)
    ]
    assert not ids[0] & ids[1]
    svg = drawing.inline_svg(CHARTS["cells"], 2)
    assert set(re.findall(r"url\(#([^)]+)\)", svg)) <= ids[1]
    assert svg == drawing.inline_svg(CHARTS["cells"], 2)


def test_hostile_names_stay_text() -> None:
    chart = line_chart(HOSTILE, [Series(name=HOSTILE, points=CURVE)], x="step", y="y")
    rows = dot_chart("t", ["a.q", f"a.{HOSTILE}'] + alert(1) + ['"], {HOSTILE: [1, 2]}, x="n")
    for one in (chart, rows):
        svg = drawing.inline_svg(one, 1)
        assert "<script" not in svg
        assert "<img" not in svg
        root = ET.fromstring(svg)  # well-formed: no name broke the markup
        assert any(HOSTILE in (part.get("data-t") or "") for part in root.iter())


UNPRINTABLE = "\x00 \x01 \x1b \x7f \n \u2028 \u2029 \ud800 \ufffe \uffff"
"""Characters that end the process in vl-convert, or that its expressions cannot hold."""


def test_unprintable_names_are_escaped(tmp_path) -> None:
    name = f"a{UNPRINTABLE}'\"\\b"
    charts = (
        line_chart(
            name, [Series(name=name, points=CURVE), Series(name="b", points=CURVE)], x="step", y="y"
        ),
        dot_chart("t", ["q", name], {name: [1, 2]}, x=name),
        heat_map(name, [[1.0, 2.0]] * 2, x="a", y="", value="v", names=[name, "c"]),
    )
    for chart in charts:
        svg = drawing.inline_svg(chart, 1)
        ET.fromstring(svg)
        assert "\\u0001" in svg
    rows = dot_chart("t", ["q", "a\x01'\"\\b"], {"s": [1, 2]}, x="n")
    texts = {part.text for part in ET.fromstring(drawing.inline_svg(rows, 1)).iter()}
    assert "a\\u0001'\"\\b" in texts
    drawing.save(Figure(caption="", charts=charts), tmp_path / "figure.svg")
    ET.parse(tmp_path / "figure.svg")


@pytest.mark.parametrize(
    ("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<svg"), (".pdf", b"%PDF")]
)
def test_a_figure_is_saved_as_a_picture(tmp_path, suffix, start) -> None:
    figure = Figure(caption="", charts=tuple(CHARTS.values()), columns=3)
    drawing.save(figure, tmp_path / f"figure{suffix}")
    assert (tmp_path / f"figure{suffix}").read_bytes().startswith(start)


def test_cells_of_a_picture_leave_no_seams(tmp_path) -> None:
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    even = heat_map("phi", [[0.5] * 64] * 64, x="j", y="i", value="phi", legend=False)
    drawing.save(Figure(caption="", charts=(even,)), tmp_path / "even.png")
    with image.open(tmp_path / "even.png") as picture:
        width, height = picture.size
        middle = picture.convert("RGB").crop(
            (width // 4, height // 4, 3 * width // 4, 3 * height // 4)
        )
    assert len(middle.getcolors()) == 1


def test_wrong_places_of_a_figure_are_errors(tmp_path) -> None:
    figure = Figure(caption="", charts=(CHARTS["bar"],))
    with pytest.raises(ConfigurationError, match=r"\.png, \.svg or \.pdf"):
        drawing.save(figure, tmp_path / "figure")
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match="Cannot write"):
        drawing.save(figure, tmp_path / "file" / "figure.png")


def test_running_mean() -> None:
    values = np.random.default_rng(0).normal(size=50)
    values[10] = 1e20  # a spike has no effect once it is outside the window
    means = running_mean(list(enumerate(values)), 8)
    expected = [values[max(0, i - 7) : i + 1].mean() for i in range(50)]
    np.testing.assert_allclose([y for _, y in means], expected, rtol=1e-12)


def test_a_thinned_line_keeps_its_ends_and_peaks() -> None:
    points = [(float(i), math.sin(i / 50)) for i in range(10_000)]
    points[777], points[5_555] = (777.0, 9.0), (5_555.0, -9.0)
    kept = thinned(points)
    assert len(kept) <= 240
    assert {points[0], points[-1], points[777], points[5_555]} <= set(kept)
    assert kept == sorted(kept)
    assert thinned(points[:200]) == points[:200]


def test_long_names_of_series_stay_apart() -> None:
    alike = ["runs/" + "a" * 40 + tail for tail in ("/seed-0", "/seed-1", "b" * 40 + "/seed-1")]
    chart = line_chart("t", [Series(name=n, points=CURVE) for n in alike], x="step", y="y")
    scale = chart.spec["layer"][0]["encoding"]["color"]["scale"]
    assert len(set(scale["domain"])) == len(set(scale["range"])) == len(alike)
    assert max(map(len, scale["domain"])) < 40
    drawn = [layer["data"]["values"][0]["series"] for layer in chart.spec["layer"][::2]]
    assert drawn == scale["domain"]


def test_a_title_is_no_wider_than_a_page() -> None:
    chart = heat_map("a long name " * 9, [[0.5]], x="j", y="i", value="phi")
    (width,) = re.findall(r'viewBox="0 0 (\d+) ', drawing.inline_svg(chart, 1))
    assert int(width) <= OUTER


def test_short_names() -> None:
    assert short_names(["m.0.q", "m.1.q"]) == ["0.q", "1.q"]
    assert short_names(["m.0.q", "m.0.v"]) == ["q", "v"]
    assert short_names(["a.b", "a"]) == ["a.b", "a"]
    assert short_names(["a.b"]) == ["a.b"]
