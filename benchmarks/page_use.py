"""Use the playground for minutes by a script, and watch the memory of the page.

    python -m benchmarks page --minutes 30

A script in Chromium sends prompts to the base, an adapter and a blend, stops and regenerates answers, edits messages,
moves sliders, votes blind, opens every dialog, exports and begins again. After each round the browser collects garbage,
and its heap and its numbers of DOM nodes and listeners are recorded. The exit status is 1 if the page reports an error,
or if the heap at the end exceeds that after a tenth of the time by more than a fifth.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from playwright.sync_api import sync_playwright

from benchmarks import report
from benchmarks.server_process import ServerProcess
from benchmarks.serving_workload import write_adapter
from lorakit.models.loading import load_base

GROWTH = 1.2
"""Largest ratio of the median heaps of the last tenth and of the second."""
NAMES = ("a", "b")
SCALE = 0.05
"""Standard deviation of the adapters' B: their answers differ from the base's, and are still text."""
PROMPTS = (
    "Name three rivers.",
    "Why is the sky blue?",
    "Write a short line about tea.",
    "What is a pub?",
)


def run(argv: Sequence[str]) -> int:
    """Use the page; return the exit status."""
    parser = argparse.ArgumentParser("python -m benchmarks page", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--results", type=Path, help="folder for page.json; default: write none")
    args = parser.parse_args(argv)
    with TemporaryDirectory() as folder:
        samples, errors = _use(args.base, Path(folder), 60 * args.minutes)
    record = {
        "machine": report.machine(),
        "minutes": args.minutes,
        "base": Path(args.base).name,
        "samples": samples,
        "errors": errors,
    }
    report.show(sections(record))
    if args.results:
        report.write_results_to(args.results)
        report.write("page", record, sections(record), quick=False)
    return int(bool(errors) or growth(samples) > GROWTH)


def growth(samples: Sequence[dict[str, Any]]) -> float:
    """Return the median heap of the last tenth of the rounds, relative to that of the second tenth."""
    size = max(len(samples) // 10, 1)
    early = median(s["heap"] for s in samples[size : 2 * size] or samples[:1])
    return median(s["heap"] for s in samples[-size:]) / early


def _use(base: str, folder: Path, seconds: float) -> tuple[list[dict[str, Any]], list[str]]:
    config = load_base(base, dtype="float32").model.config
    for seed, name in enumerate(NAMES):
        write_adapter(folder / "adapters" / name, config, seed=seed, scale=SCALE)
    server = ServerProcess(base, folder / "adapters", folder / "log")
    errors: list[str] = []
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
            )
            page = browser.new_page(viewport={"width": 1200, "height": 900})
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
            page.goto(f"{server.url}/#mode=chat&max_tokens=24&temperature=1")
            samples = _rounds(page, seconds)
            browser.close()
    finally:
        server.stop()
    return samples, errors


def _rounds(page: Any, seconds: float) -> list[dict[str, Any]]:
    page.wait_for_selector(".pane")
    page.locator(".pane .model").nth(2).select_option(label="Blend of adapters …")
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable")
    order = random.Random(0)
    began, samples = time.monotonic(), []
    while time.monotonic() - began < seconds:
        _round(page, order)
        session.send("HeapProfiler.collectGarbage")
        found = {m["name"]: m["value"] for m in session.send("Performance.getMetrics")["metrics"]}
        samples.append(
            {
                "seconds": time.monotonic() - began,
                "heap": found["JSHeapUsedSize"],
                "nodes": found["Nodes"],
                "listeners": found["JSEventListeners"],
            }
        )
    return samples


def _round(page: Any, order: random.Random) -> None:
    """Use everything once, and end with an empty conversation."""
    _send(page, order.choice(PROMPTS))
    page.locator("input[type=range]").first.fill(str(order.randrange(0, 40) / 20))
    page.wait_for_timeout(500)
    _finish(page)
    page.locator(".again").first.click()
    page.locator(".stop").first.evaluate("button => button.click()")  # unless it has finished
    _finish(page)
    _send(page, order.choice(PROMPTS))
    page.locator(".user button").first.click()
    _send(page, order.choice(PROMPTS))
    if page.locator(".token").count():
        page.locator(".token").first.dispatch_event("pointerover")  # a random model's may be blank
    for opener in (".code", ".card", "[data-opens=session-dialog]"):
        page.locator(opener).first.click()
        page.wait_for_selector("dialog[open]")
        if opener.startswith("["):
            with page.expect_download():
                page.click("#export")
        page.keyboard.press("Escape")
    page.check("#blind")
    _send(page, order.choice(PROMPTS))
    page.locator("#vote-buttons button").first.click()
    page.uncheck("#blind")
    page.click("#clear")


def _send(page: Any, text: str) -> None:
    page.fill("#prompt", text)
    page.click("#send")
    _finish(page)


def _finish(page: Any) -> None:
    page.wait_for_selector("#stop-all:disabled", timeout=300_000)


def sections(record: dict[str, Any]) -> list[report.Section]:
    """Return the table."""
    samples = record["samples"]
    table = report.table("after", "heap, MB", "nodes", "listeners")
    for share in (0, 0.1, 0.25, 0.5, 0.75, 1):
        sample = samples[min(int(share * len(samples)), len(samples) - 1)]
        table.add_row(
            f"{sample['seconds'] / 60:.1f} minutes",
            f"{sample['heap'] / 1e6:.2f}",
            f"{sample['nodes']:,}",
            f"{sample['listeners']:,}",
        )
    title = f"The playground in use for {record['minutes']:g} minutes: {len(samples):,} rounds"
    note = (
        f"Heap of the last tenth relative to the second tenth: {growth(samples):.3f}. "
        f"Errors of the page: {len(record['errors'])}."
    )
    return [report.Section(title, table, note)]


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
