"""What all tests rely on: see conftest.py."""

from __future__ import annotations

import re
from pathlib import Path

from hypothesis import settings

from lorakit.cli.console import console

TESTS = Path(__file__).parent


def test_coroutines_run_in_their_own_thread() -> None:
    """The main thread can run no event loop once a test has opened the browser."""
    direct = re.compile(r"\basyncio\.run\b")
    files = [p.name for p in TESTS.rglob("*.py") if direct.search(p.read_text(encoding="utf-8"))]
    assert files == ["own_loop.py"]


def test_generated_examples_are_the_same_on_every_machine() -> None:
    assert settings.default is not None
    assert (settings.default.deadline, settings.default.derandomize) == (None, True)


def test_output_is_not_taken_for_a_terminal() -> None:
    """CI systems and shells may export FORCE_COLOR."""
    assert not console().is_terminal
