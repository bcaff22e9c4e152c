"""A server with the playground, and what tests do on its page."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlencode

import httpx
from browser import Browser, Opened
from whole import served

from lorakit.serving.opening import Opened as Server

SEED, MOST = 7, 24


@dataclass
class Site:
    """A server with a page."""

    address: str
    opened: Server
    steps: int = 0
    """Steps that the engine has computed."""
    last_step: float = math.inf
    """The step after which the engine waits."""

    @contextlib.contextmanager
    def holding(self, *, after: int = 0) -> Iterator[None]:
        """Let the engine compute `after` more steps, then hold it until the end of the block."""
        self.last_step = self.steps + after
        try:
            yield
        finally:
            self.last_step = math.inf

    def link(self, *models: str, blend: dict[str, float] | None = None, **settings: Any) -> str:
        query = [("model", name) for name in models]
        if blend:
            query.append(("blend", json.dumps(blend)))
        own = {"mode": "chat", "temperature": 1, "seed": SEED, "max_tokens": MOST, **settings}
        return f"{self.address}/#{urlencode([*query, *own.items()])}"

    def ask(self, path: str, **body: Any) -> dict[str, Any]:
        answer = httpx.post(f"{self.address}/v1/{path}", json=body, timeout=30)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def chat(self, model: str, *texts: str, **body: Any) -> str:
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
        own = {"temperature": 1, "seed": SEED, "max_completion_tokens": MOST, **body}
        answer = self.ask("chat/completions", model=model, messages=messages, **own)
        return answer["choices"][0]["message"]["content"]


@contextlib.contextmanager
def site_of(folder: Path, live: Any, **options: Any) -> Iterator[Site]:
    with served(folder, **options) as (client, opened):
        site = Site(live(SimpleNamespace(app=client.app)), opened)
        advance = opened.engine._advance

        def held() -> bool:
            while site.steps >= site.last_step:
                time.sleep(0.005)
            computed = advance()
            site.steps += computed
            return computed

        opened.engine._advance = held  # type: ignore[method-assign]
        yield site


@contextlib.contextmanager
def playground(browser: Browser, address: str, **options: Any) -> Iterator[Opened]:
    """Open the page and wait until its panes are there, which is after it has read the models."""
    with browser.open(address, **options) as opened:
        opened.page.wait_for_selector(".pane")
        yield opened


def panes(opened: Opened) -> list[Any]:
    return opened.page.locator(".pane").all()


def send(opened: Opened, text: str = "The river") -> None:
    opened.page.fill("#prompt", text)
    opened.page.click("#send")
    finish(opened)


def finish(opened: Opened) -> None:
    """Wait until no pane computes."""
    opened.page.wait_for_selector("#stop-all:disabled", timeout=20_000)


def until(opened: Opened, script: str) -> None:
    """Wait for a condition. Playwright's own waiting would need `eval`, which the page forbids."""
    end = time.monotonic() + 10
    while not opened.run(script):
        assert time.monotonic() < end, f"not within 10 s: {script}"
        opened.page.wait_for_timeout(20)


def answers(opened: Opened) -> list[str]:
    """Return the last answer of each pane."""
    return [pane.locator(".turn:last-child .answer").last.text_content() for pane in panes(opened)]


def clean(opened: Opened, site: Site) -> None:
    """Check that the page reported no error and asked no other server."""
    assert [m for m in opened.messages if "404" not in m and "401" not in m] == []
    own = (site.address, "blob:", "data:", "about:")
    assert [url for url in opened.requests if not url.startswith(own)] == []
