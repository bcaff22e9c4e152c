"""Charts drawn: as SVG inside a page, as PNG, SVG and PDF files for papers.

Vega-Lite draws them in this process (`vl-convert-python`), without a browser and without the network. In a page
the SVG keeps its numbers, needs no script to be seen, and takes the page's colours, so that it follows dark mode.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from lorakit import storage
from lorakit.errors import ConfigurationError
from lorakit.reporting.axes import GRID, INK, MUTED, Spec
from lorakit.reporting.charts import SERIES, Chart, Figure

FORMATS = (".png", ".svg", ".pdf")
SCALE = 2
"""Pixels of a PNG per pixel of the design: 192 dots an inch at the size it has on a page. A whole number: the cells of
heat maps end where pixels do, else light seams show between them."""

VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid"} | {
    colour: f"--series-{number}" for number, colour in enumerate(SERIES, 1)
}
"""The page's CSS variable for each colour of a chart; heat maps keep theirs in any mode."""

_CONFIG: Spec = {
    "font": "sans-serif",
    "view": {"stroke": None},
    "axis": {
        "aria": False,
        "labelColor": MUTED,
        "titleColor": MUTED,
        "titleFontWeight": "normal",
        "titleFontSize": 11,
        "titlePadding": 6,
        "labelFontSize": 11,
        "gridColor": GRID,
        "domainColor": MUTED,
        "tickColor": MUTED,
        "tickSize": 4,
        "labelFlush": False,
    },
    "axisY": {"domain": False, "ticks": False, "labelPadding": 6},
    "legend": {
        "aria": False,
        "title": None,
        "orient": "top",
        "direction": "horizontal",
        "labelColor": INK,
        "titleColor": MUTED,
        "titleFontWeight": "normal",
        "labelFontSize": 11,
        "labelLimit": 220,
        "symbolStrokeWidth": 2.5,
        "offset": 6,
    },
    "title": {
        "aria": False,
        "anchor": "start",
        "frame": "group",
        "color": INK,
        "fontSize": 12,
        "fontWeight": 600,
        "offset": 10,
    },
}


def require_drawing() -> ModuleType:
    """Return the module that draws.

    Raises:
        ConfigurationError: It is not installed.
    """
    try:
        import vl_convert
    except ImportError:
        raise ConfigurationError(
            "Reports and figures need vl-convert-python: pip install 'lorakit[report]'"
        ) from None
    return vl_convert


def require_format(path: str | Path) -> str:
    """Return the suffix of a picture's path.

    Raises:
        ConfigurationError: It is of no format that can be written.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise ConfigurationError(
            f"'{path}' does not say the figure's format. End it in .png, .svg or .pdf."
        )
    return suffix


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure; the suffix says the format (.png, .svg, .pdf).

    Raises:
        ConfigurationError: The suffix is of no such format, or vl-convert-python is not installed.
        RunFolderError: The file cannot be written.
    """
    suffix = require_format(path)
    vl_convert = require_drawing()
    spec = _joined(figure)
    if suffix == ".png":
        content = vl_convert.vegalite_to_png(spec, scale=SCALE)
    elif suffix == ".svg":
        content = vl_convert.vegalite_to_svg(spec).encode()
    else:
        content = vl_convert.vegalite_to_pdf(spec)
    with storage.atomic_file(path) as temporary:
        temporary.write_bytes(content)


def inline_svg(chart: Chart, number: int) -> str:
    """The chart as an SVG element of a page, the `number`-th there.

    The labels of its marks become the attribute data-t, from which the page's script shows them: a screen reader
    should hear the chart's one sentence, not its thousand points.
    """
    spec = {**_titled(chart), "config": _CONFIG, "background": None, "padding": 4}
    svg: str = require_drawing().vegalite_to_svg(spec)
    head, body = re.fullmatch(r"\s*(<svg\b[^>]*>)(.*)", svg, re.DOTALL).groups()  # type: ignore[union-attr]
    size = re.search(r'width="([\d.]+)" height="([\d.]+)"', head)
    assert size is not None
    width, height = (round(float(side)) for side in size.groups())
    body = re.sub(
        r'aria-label="([^"]*)" role="graphics-symbol" aria-roledescription="[^"]*"',
        r'data-t="\1"',
        body,
    )
    body = re.sub(r' (?:role|aria-[a-z]+|pointer-events|font-family)="[^"]*"', "", body)
    body = re.sub(r"rgb\((\d+), (\d+), (\d+)\)", _hexadecimal, body)
    # Ids are the page's, not the picture's, and the same whatever was drawn before.
    names = dict.fromkeys(re.findall(r'\bid="([^"]+)"', body))
    for place, name in enumerate(names):
        body = re.sub(
            rf'(\bid="|url\(#|href="#){re.escape(name)}(?=["\)])', rf"\1c{number}-{place}", body
        )
    body = re.sub(r' (d|transform)="[^"]*"', lambda found: _rounded(found[0]), body)
    return (
        f'<svg class="chart" role="img" aria-label="{html.escape(chart.alt)}" tabindex="0" '
        f'viewBox="0 0 {width} {height}" style="max-width:{1.15 * width:.0f}px">{body}'
    )


def _hexadecimal(found: re.Match[str]) -> str:
    """A colour in the half of the letters: heat maps have thousands."""
    return "#" + "".join(f"{int(part):02x}" for part in found.groups())


def _rounded(attribute: str) -> str:
    """Two decimals are a fiftieth of what an eye sees; a line of hundreds of points needs no more."""
    return re.sub(r"(\.\d\d)\d+", r"\1", attribute)


def _titled(chart: Chart) -> Spec:
    return {**chart.spec, "title": chart.title} if chart.title else dict(chart.spec)


def _joined(figure: Figure) -> Spec:
    top: dict[str, Any] = {"background": "white", "padding": 8, "config": _CONFIG}
    views = [{**_titled(chart), "description": chart.alt} for chart in figure.charts]
    if len(views) == 1:
        return {**top, **views[0]}
    return {
        **top,
        "concat": views,
        "columns": figure.columns,
        "resolve": {
            "scale": {c: "independent" for c in ("color", "shape", "strokeDash")},
            "legend": {"color": "independent"},
        },
    }
