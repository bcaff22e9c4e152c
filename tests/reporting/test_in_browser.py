"""Pages in Chromium: complete, offline, readable on a phone, in dark mode and in print."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import tiny_runs
from browser import HOSTILE

from lorakit.planning import plan
from lorakit.planning.machine import Machine
from lorakit.planning.report import plan_page
from lorakit.reporting import Figure, Page, Section, read_run, run_page
from lorakit.reporting.charts import Series, line_chart
from lorakit.reporting.comparison import comparison_page
from lorakit.reporting.heat_maps import heat_map
from lorakit.reporting.page import Table

pytestmark = pytest.mark.slow  # each page starts a browser

MEGABYTE = 1_000_000
CHARTS = {"run": 5, "comparison": 5, "plan": 4}
"""Least number of charts of each page."""

CONTRASTS = """() => {
  // Contrast ratio (WCAG 2) of every text and the first background behind it.
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].reduce((sum, v, i) => {
    const c = v / 255;
    return sum + [0.2126, 0.7152, 0.0722][i] * (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  }, 0);
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = parse(getComputedStyle(e).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (!node.data.trim() || ["SCRIPT", "STYLE"].includes(element.tagName)) continue;
    const style = getComputedStyle(element);
    const colour = parse(element.closest("svg") ? style.fill : style.color);
    const [a, b] = [luminance(colour), luminance(behind(element))].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), node.data.trim().slice(0, 40)]);
  }
  return found;
}"""


TYPE_SIZES = """() => [...document.querySelectorAll('svg.chart')].flatMap((svg) => {
  // Sizes in pixels of the screen of all texts of charts but their titles.
  const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
  const texts = [...svg.querySelectorAll('text')];
  return texts.map((text) => scale * parseFloat(text.getAttribute('font-size')));
})"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A page with heat maps with and without names, a line chart and a table that is wider than a phone."""
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(40)]
    rows = [[(i + j) / 50 for j in range(8)] for i in range(40)]
    rows[1][2] = math.nan
    named = heat_map("Shares", rows, x="rank", y="", value="share", names=names)
    square = heat_map("phi", rows, x="j", y="i", value="phi")
    line = line_chart("Loss", [Series(name="a", points=[(1, 3), (9, 2)])], x="step", y="loss")
    charts = Figure(caption="All.", charts=(line, named, square))
    columns = ("Matrix", *(f"a wide column {i}" for i in range(9)))
    table = Table(
        caption="Wide.",
        columns=columns,
        rows=[(name, *[1.5] * 9) for name in ["Perplexity", *names]],
    )
    section = Section(title="All", blocks=[charts, table])
    page = Page(kind="Charts", title="Wide", sections=[section])
    return page.write(tmp_path_factory.mktemp("wide") / "wide.html")


@pytest.mark.parametrize("width", [360, 390, 800, 1200])
def test_all_charts_have_type_of_one_size(browser, wide, width) -> None:
    with browser.open(wide, width=width, is_mobile=width < 500) as opened:
        sizes = opened.run(TYPE_SIZES)
        assert max(sizes) / min(sizes) < 1.15  # titles have 12 pixels for 11
        assert min(sizes) >= 10
        assert opened.run("document.documentElement.scrollWidth") <= width


def test_the_names_of_rows_stay_while_a_wide_table_scrolls(browser, wide) -> None:
    with browser.open(wide, width=390, is_mobile=True) as opened:
        place = (
            "['tbody th', 'tbody td'].map(s => document.querySelector(s).getBoundingClientRect().x)"
        )
        (name, cell), box = opened.run(place), "document.querySelector('.scroll')"
        assert opened.run(f"{box}.scrollWidth > {box}.clientWidth + 200")
        opened.run(f"{box}.scrollLeft = 200")
        assert opened.run(place) == [name, cell - 200]
        # The names cover the cells that pass below them, and leave most of the width to them.
        opened.run("document.querySelector('tbody th').scrollIntoView()")
        y = opened.run("document.querySelector('tbody th').getBoundingClientRect().y + 5")
        assert opened.run(f"document.elementFromPoint(20, {y}).scope") == "row"
        names = "[...document.querySelectorAll('tbody th')].map(th => [th.offsetWidth, th.offsetHeight])"
        (width, short), (_, long), *_ = opened.run(names)
        assert width <= 150
        assert short < long  # a short name is not broken, a long one is


def test_arrow_keys_and_taps_reach_every_cell_of_a_heat_map(browser, wide) -> None:
    with browser.open(wide, width=390, is_mobile=True, has_touch=True) as opened:
        page = opened.page
        page.locator("svg.chart").nth(2).focus()
        keys = ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowDown", "ArrowDown", "ArrowUp")
        shown = []
        for key in keys:
            page.keyboard.press(key)
            # Also while a scroll to the focused chart hides the numbers.
            shown.append((page.locator("#tip").text_content() or "").split(":")[0])
        page.keyboard.press("Control+ArrowDown")  # of the browser
        assert shown[-1] in (page.locator("#tip").text_content() or "")
        # The cell (2, 3) is empty.
        assert shown == ["i 1, j 1", "i 1, j 2", "i 1, j 3", "i 3, j 3", "i 4, j 3", "i 3, j 3"]
        page.keyboard.press("Escape")
        page.keyboard.press("ArrowLeft")
        assert "i 40, j 8" in (page.locator("#tip").text_content() or "")
        full = "model.layers.5.self_attn.q_proj, rank 2"
        page.locator(f'svg.chart [data-t^="{full}"]').tap()
        assert page.locator("#tip").inner_text().startswith(full)
        page.locator("h1").tap()
        assert not page.locator("#tip").is_visible()


@pytest.fixture(scope="module")
def pages(run: Path, unfinished: Path, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    one, other = read_run(run), read_run(unfinished)
    config = tiny_runs.config(run.parent, str(run.parent / "base"), max_steps=30)
    machine = Machine(products=1e9, traffic=1e9, draws=1e9, origin=HOSTILE)
    planned = plan(config, length=32, machine=machine)
    return {
        "run": run_page(dataclasses.replace(one, predicted={"seconds": 1.0})).write(
            folder / "run.html"
        ),
        "comparison": comparison_page([one, other]).write(folder / "comparison.html"),
        "plan": plan_page(planned, config, command=f"lorakit plan {HOSTILE}").write(
            folder / "plan.html"
        ),
    }


def test_samples_have_the_direction_of_their_text(browser, run: Path, tmp_path: Path) -> None:
    record = read_run(run)
    samples = [{**s, "prompt": "שלום!", "output": "עולם."} for s in record.samples]
    page = run_page(dataclasses.replace(record, samples=samples)).write(tmp_path / "run.html")
    with browser.open(page) as opened:
        for selector in ("pre.prompt", ".sample dd"):
            found = f"getComputedStyle(document.querySelector('{selector}')).direction"
            assert opened.run(found) == "rtl"


@pytest.mark.parametrize("name", CHARTS)
def test_a_page_is_whole_and_asks_for_nothing(browser, pages, name) -> None:
    assert pages[name].stat().st_size < 3 * MEGABYTE
    with browser.open(pages[name]) as opened:
        assert opened.requests == [pages[name].as_uri()]
        assert opened.messages == []
        assert opened.run("document.querySelectorAll('svg.chart').length") >= CHARTS[name]
        assert opened.run("document.title") != "owned"


def test_its_policy_would_stop_a_script_that_got_in(browser, pages) -> None:
    with browser.open(pages["run"]) as opened:
        opened.run(
            "const s = document.createElement('script'); s.textContent = 'document.title = `owned`';"
            "document.body.append(s); fetch('https://example.org').catch(() => 0)"
        )
        assert opened.run("document.title") != "owned"
        assert any("Content Security Policy" in message for message in opened.messages)


@pytest.mark.parametrize("name", CHARTS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_contrast(browser, pages, name, scheme) -> None:
    with browser.open(pages[name], color_scheme=scheme) as opened:
        dark = opened.run("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
        assert dark == (scheme == "dark")
        contrasts = opened.run(CONTRASTS)
    assert len(contrasts) > 80
    assert min(contrasts)[0] >= 4.5, min(contrasts)


@pytest.mark.parametrize("name", CHARTS)
def test_a_phone_shows_it_without_scrolling_sideways(browser, pages, name) -> None:
    with browser.open(pages[name], width=360, is_mobile=True) as opened:
        assert opened.run("document.documentElement.scrollWidth") <= 360
        assert min(opened.run(TYPE_SIZES)) >= 10
        # A table may scroll, but its caption must stay visible.
        ends = opened.run(
            "[...document.querySelectorAll('caption')].map(c => c.getBoundingClientRect().right)"
        )
        assert max(ends) <= 360


def test_pointing_at_a_curve_shows_its_numbers(browser, pages) -> None:
    with browser.open(pages["run"]) as opened:
        page = opened.page
        assert not page.locator("#tip").is_visible()
        mark = page.locator('[data-t^="learning rate, step 20:"]')
        mark.scroll_into_view_if_needed()
        box = mark.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 40)  # below it, not on it
        assert page.locator("#tip").inner_text().startswith("learning rate, step 20: 0.0")
        page.keyboard.press("Escape")
        page.mouse.move(1, 1)
        assert not page.locator("#tip").is_visible()
        svg = page.locator("svg.chart").first
        svg.focus()
        page.keyboard.press("ArrowRight")
        assert "step 1:" in page.locator("#tip").inner_text()


def test_pointing_at_a_part_of_a_bar_shows_its_numbers(browser, pages) -> None:
    with browser.open(pages["plan"]) as opened:
        page = opened.page
        part = page.locator('[data-t^="LoRA, allocator, software:"]')
        part.scroll_into_view_if_needed()
        box = part.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        assert page.locator("#tip").inner_text() == part.get_attribute("data-t")


@pytest.mark.parametrize("name", ["run", "plan"])
def test_headings_tables_and_pictures_are_named(browser, pages, name) -> None:
    with browser.open(pages[name]) as opened:
        levels = opened.run("[...document.querySelectorAll('h1,h2,h3')].map(h => +h.tagName[1])")
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
        assert opened.run("[...document.querySelectorAll('table')].every(t => t.caption.innerText)")
        assert opened.run("[...document.querySelectorAll('th')].every(th => th.scope)")
        assert opened.run(
            "[...document.querySelectorAll('svg.chart')].every(s => s.ariaLabel.length > 20)"
        )
        assert opened.run("document.documentElement.lang") == "en"


def test_in_print_it_is_light_and_whole(browser, pages, tmp_path) -> None:
    with browser.open(pages["run"], color_scheme="dark") as opened:
        opened.page.emulate_media(media="print")
        assert opened.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        pdf = opened.page.pdf(format="A4")
    assert pdf.startswith(b"%PDF")
    with browser.open(pages["run"]) as opened:
        opened.run("dispatchEvent(new Event('beforeprint'))")
        assert opened.run("[...document.querySelectorAll('details')].every(d => d.open)")
