"""The live line of a run, on terminals of any width."""

from __future__ import annotations

import io
import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from lorakit.training import progress
from lorakit.training.checkpoint import State
from lorakit.training.progress import Reporter


def reporter(monkeypatch, width: int, **options: Any) -> tuple[Reporter, io.StringIO]:
    """Return a reporter of a run of 3000 steps that writes to a terminal of this width."""
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, color_system=None)
    monkeypatch.setattr(progress, "_console", lambda **_: console)
    return _reporter(monkeypatch, **options), file


def _reporter(monkeypatch, **options: Any) -> Reporter:
    monkeypatch.setattr(progress, "peak_memory", lambda _: 449 * 10**6)
    monkeypatch.setattr(progress, "first_lines", lambda _: [])
    job: Any = SimpleNamespace(
        step_plan=SimpleNamespace(total=3000),
        device=torch.device("cpu"),
        processes=SimpleNamespace(is_first=True),
    )
    return Reporter(job, State(**options))


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (
            80,
            "step 141/3000  loss 5.396  1m 31s left  34,570 tokens/s  rate 4.92e-04  449 MB",
        ),
        (40, "step 141/3000  loss 5.396  1m 31s left"),
        (20, "step 141/3000"),
    ],
)
def test_a_narrow_terminal_shows_the_step_and_what_fits(monkeypatch, width, shown) -> None:
    show, file = reporter(monkeypatch, width)
    with show:
        show.step(State(step=141, train_loss=5.396, tokens=155_565, seconds=4.5), 4.92e-4)
    lines = re.split(r"\x1b\[\??\d+[a-zA-Z]|\s*\n", file.getvalue())
    assert [line for line in lines if line.strip()][-1] == shown


def test_a_wide_terminal_has_room_for_the_bar(monkeypatch) -> None:
    show, file = reporter(monkeypatch, 120)
    with show:
        show.step(State(step=141, train_loss=5.396, tokens=155_565, seconds=4.5), 4.92e-4)
    assert "━" in file.getvalue()
    assert "  step 141/3000  loss 5.396  1m 31s left" in file.getvalue()
    assert "449 MB" in file.getvalue()


def test_a_notebook_gets_plain_lines_on_standard_error(monkeypatch, capsys) -> None:
    """Its standard error says that it is a terminal, and rich would display each line as an output of its own."""
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    show = _reporter(monkeypatch)
    with show:
        show.say("base      tiny")
        show.step(State(step=3000, train_loss=5.396, tokens=155_565, seconds=4.5), 4.92e-4)
    first, last = capsys.readouterr().err.splitlines()
    assert first == "base      tiny"
    assert last.startswith("step 3000/3000  loss 5.396  0s left")
