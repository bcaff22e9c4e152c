from __future__ import annotations

from collections.abc import Callable

import pytest

from lorakit.cli import main


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs a command and returns its status, its output and its messages."""

    def run(*argv: object) -> tuple[int, str, str]:
        return main([*map(str, argv)]), *capsys.readouterr()

    return run


@pytest.fixture(autouse=True)
def _plans(instant_products: None) -> None:
    """Tests of commands do not look at the times of a plan."""
