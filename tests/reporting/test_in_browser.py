"""Pages in Chromium: complete, offline, readable on a phone, in dark mode and in print."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import tiny_runs
from browser import HOSTILE

from lorakit.planning import plan
from lorakit.planning.machine import Machine
from lorakit.planning.report import plan_page
from lorakit.reporting import read_run, run_page
from lorakit.reporting.comparison import comparison_page

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
        sizes = opened.run(
            "[...document.querySelectorAll('svg.chart text')].map(t => t.getBoundingClientRect().height)"
        )
        assert min(sizes) > 7
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
