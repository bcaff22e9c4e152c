"""Headless Chromium that records the requests and console messages of a page."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
)
"""A text that would run a script in a page that does not escape it."""


@dataclass
class Opened:
    """A page that is open in the browser."""

    page: Any
    requests: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def run(self, script: str) -> Any:
        return self.page.evaluate(script)


class Browser:
    def __init__(self, chromium: Any) -> None:
        self._chromium = chromium

    @contextmanager
    def open(self, place: Path | str, *, width: int = 1200, **options: Any) -> Iterator[Opened]:
        """Open a file or an address."""
        context = self._chromium.new_context(viewport={"width": width, "height": 900}, **options)
        try:
            opened = Opened(context.new_page())
            opened.page.on("request", lambda request: opened.requests.append(request.url))
            opened.page.on("console", lambda message: opened.messages.append(message.text))
            opened.page.on("pageerror", lambda error: opened.messages.append(str(error)))
            opened.page.goto(place.as_uri() if isinstance(place, Path) else place)
            yield opened
        finally:
            context.close()


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Start $CHROMIUM or a Chromium on the path; skip the test if none is installed."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    executable = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if executable is None:
        pytest.skip("no Chromium is installed; set CHROMIUM to its path")
    with sync_api.sync_playwright() as playwright:
        # Chromium refuses to run its sandbox as root; the pages are trusted.
        chromium = playwright.chromium.launch(
            executable_path=executable, args=["--no-sandbox", "--disable-gpu"]
        )
        try:
            yield Browser(chromium)
        finally:
            chromium.close()
