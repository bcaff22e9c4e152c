"""The first hour with lorakit: every command and Python block of the pages runs as written and prints what they show."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import made
import pages
import presumed
import pytest
from walk import Presumed, walk

Reader = Callable[[str], Path]


def steps_of(page: str, kinds: tuple[str, ...]) -> list[pages.Step]:
    return [
        step
        for step in pages.steps(page, pages.read(page))
        if step.kind in kinds and not step.text.startswith(tuple(presumed.NOT_RUN))
    ]


COMMANDS, PYTHON = ("command", "file"), ("python",)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in pages.PAGES if steps_of(page, ("command",))])
def test_commands(page: str, reader: Reader) -> None:
    reader(page)
    failures = walk(
        steps_of(page, COMMANDS), presumed.COMMANDS.get(page, Presumed()), vars(made).copy()
    )
    assert not failures, "\n".join(["", *failures])


@pytest.mark.slow
# PEFT and TRL use a name that transformers deprecates.
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("page", [page for page in pages.PAGES if steps_of(page, PYTHON)])
def test_python(page: str, reader: Reader) -> None:
    reader(page)
    failures = walk(
        steps_of(page, PYTHON), presumed.PYTHON.get(page, Presumed()), vars(made).copy()
    )
    assert not failures, "\n".join(["", *failures])
