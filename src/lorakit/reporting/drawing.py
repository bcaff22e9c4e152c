"""Rendering of charts: SVG inside a page; PNG, SVG and PDF files for papers.

`vl-convert-python` runs Vega-Lite in this process, without a browser and without network access. The SVG of a page
works without scripts and uses the page's CSS colours, so that it follows dark mode.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from lorakit import storage
from lorakit.errors import ConfigurationError
from lorakit.formatting import visible
from lorakit.reporting.axes import FONT_SIZE, GRID, INK, MUTED, OUTER, Spec
from lorakit.reporting.charts import SERIES, Chart, Figure

FORMATS = (".png", ".svg", ".pdf")
SCALE = 2
"""Pixels of a PNG per pixel of the chart: 192 dpi at the size on a page. It is an integer so that the cells of heat
maps end on pixel borders; otherwise light seams show between them."""

VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid"} | {
    colour: f"--series-{number}" for number, colour in enumerate(SERIES, 1)
}
"""The page's CSS variable for each chart colour. Heat maps have the same colours in dark mode."""

_CONFIG: Spec = {
    "font": "sans-serif",
    "view": {"stroke": None},
    "axis": {
        "aria": False,
        "labelColor": MUTED,
        "titleColor": MUTED,
        "titleFontWeight": "normal",
        "titleFontSize": FONT_SIZE,
        "titlePadding": 6,
        "labelFontSize": FONT_SIZE,
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
        "labelFontSize": FONT_SIZE,
        "labelLimit": 220,
        "symbolStrokeWidth": 2.5,
        "offset": 6,
    },
    "title": {
        "aria": False,
        "anchor": "start",
        "frame": "bounds",
        "color": INK,
        "fontSize": 12,
        "fontWeight": 600,
        "offset": 10,
        "limit": OUTER - 8,  # a wider title is cut: it would widen its map
    },
}


_PADDING = {"left": 0, "right": 4, "top": 4, "bottom": 4}
"""Pixels around a chart in a page. Its title begins where the caption does."""


def require_drawing() -> ModuleType:
    """Return the module `vl_convert`, or raise a ConfigurationError if it is not installed."""
    try:
        import vl_convert
    except ImportError:
        raise ConfigurationError(
            "Reports and figures need vl-convert-python, which is not installed. "
            'Run: pip install "lorakit[report]"'
        ) from None
    return vl_convert


def require_format(path: str | Path) -> str:
    """Return the suffix of a picture's path in lower case, or raise a ConfigurationError if it is not in `FORMATS`."""
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise ConfigurationError(
            f"The figure '{path}' has the suffix '{suffix}', expected .png, .svg or .pdf."
        )
    return suffix


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure in the format of the suffix: .png, .svg or .pdf.

    Raises:
        ConfigurationError: The suffix is none of these, or vl-convert-python is not installed.
        RunFolderError: The file cannot be written.
    """
    suffix = require_format(path)
    vl_convert = require_drawing()
    spec = _drawable(_joined(figure))
    if suffix == ".png":
        content = vl_convert.vegalite_to_png(spec, scale=SCALE)
    elif suffix == ".svg":
        content = vl_convert.vegalite_to_svg(spec).encode()
    else:
        content = vl_convert.vegalite_to_pdf(spec)
    with storage.atomic_file(path) as temporary:
        temporary.write_bytes(content)


def inline_svg(chart: Chart, number: int) -> str:
    """Return the chart as an SVG element. `number` is unique in the page and prefixes the ids.

    The labels of marks move to the attribute data-t, where the page's script reads them. A screen reader then reads
    only the chart's description instead of a thousand points.
    """
    spec = {**_titled(chart), "config": _CONFIG, "background": None, "padding": _PADDING}
    if not chart.fixed:
        spec |= {"width": OUTER, "autosize": {"type": "fit-x", "contains": "padding"}}
    svg: str = require_drawing().vegalite_to_svg(_drawable(spec))
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
    # Renumber the ids: they must be unique in the page and not depend on earlier drawings.
    ids = dict.fromkeys(re.findall(r'\bid="([^"]+)"', body))
    for i, old in enumerate(ids):
        body = re.sub(
            rf'(\bid="|url\(#|href="#){re.escape(old)}(?=["\)])', rf"\1c{number}-{i}", body
        )
    body = re.sub(r' (d|transform)="[^"]*"', _rounded, body)
    return (
        f'<svg class="chart" role="img" aria-label="{html.escape(visible(chart.alt))}" tabindex="0" '
        # One scale for all charts of a page, so that their type has one size.
        f'viewBox="0 0 {width} {height}" style="width:{width / OUTER:.2%};max-width:{1.15 * width:.0f}px">{body}'
    )


def _hexadecimal(match: re.Match[str]) -> str:
    """Return a colour in half as many characters: heat maps have thousands of colours."""
    return "#" + "".join(f"{int(part):02x}" for part in match.groups())


def _rounded(match: re.Match[str]) -> str:
    """Cut coordinates to two decimals, which is far below what is visible."""
    return re.sub(r"(\.\d\d)\d+", r"\1", match[0])


def _drawable(spec: Any) -> Any:
    """Return a chart with `visible` texts: vl-convert ends the process at a character that XML cannot hold."""
    if isinstance(spec, str):
        return visible(spec)
    if isinstance(spec, dict):
        return {key: _drawable(value) for key, value in spec.items()}
    return [_drawable(value) for value in spec] if isinstance(spec, (list, tuple)) else spec


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
