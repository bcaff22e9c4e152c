"""Read the pages of the documentation as steps: commands with their output, Python blocks, and files to write."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[2]
_GUIDES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs/guides").glob("*.md"))
PAGES = ("README.md", "docs/quickstart.md", "docs/index.md", *_GUIDES)

_FENCE = re.compile(r"(?P<indent> *)(?P<ticks>`{3,})(?P<language>\w*)")
_FILE = re.compile(r"# (\S+\.ya?ml)$")
_SNIPPET = re.compile(r'--8<-- "(?P<file>[^":]+):(?P<section>[^"]+)"')


@dataclass(frozen=True)
class Block:
    """A fenced code block.

    Attributes:
        page: Path of the page from the repository's root.
        line: Line of the page with the first line of the block.
        language: Word after the opening fence.
        lines: Lines of the block without its indentation.
    """

    page: str
    line: int
    language: str
    lines: tuple[str, ...]

    @property
    def text(self) -> str:
        """The content of the block."""
        return "\n".join(self.lines) + "\n"


@dataclass(frozen=True)
class Step:
    """One thing that a reader does.

    Attributes:
        kind: A shell command, a Python block, or a file to write.
        page: Path of the page from the repository's root.
        line: Line of the page that the step starts at.
        text: The command, the code, or the content of the file.
        output: Lines of output under a command; none if the page shows none.
        file: Name of the file to write.
    """

    kind: Literal["command", "python", "file"]
    page: str
    line: int
    text: str
    output: tuple[str, ...] = ()
    file: str = ""


def read(page: str) -> str:
    """Return the text of a page."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, text: str) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    found: list[Block] = []
    opened: re.Match[str] | None = None
    first, content = 0, []
    for number, line in enumerate(text.splitlines(), start=1):
        if opened is None:
            if opened := _FENCE.match(line):
                first, content = number + 1, []
        elif line.strip() == opened["ticks"]:
            found.append(Block(page, first, opened["language"], tuple(content)))
            opened = None
        else:
            content.append(line.removeprefix(opened["indent"]))
    assert opened is None, f"{page}:{first - 1}: the block is not closed"
    return found


def steps(page: str, text: str) -> list[Step]:
    """Return the steps of a page, in order."""
    return [step for block in blocks(page, text) for step in _steps(block)]


def _steps(block: Block) -> Iterator[Step]:
    if block.language == "console":
        yield from _commands(block)
    elif block.language == "python":
        yield Step("python", block.page, block.line, _with_snippets(block.text))
    elif block.language == "yaml" and (name := _FILE.match(block.lines[0])):
        yield Step("file", block.page, block.line, block.text, file=name[1])


def _commands(block: Block) -> Iterator[Step]:
    lines = list(enumerate(block.lines, start=block.line))
    assert lines[0][1].startswith("$ "), f"{block.page}:{block.line}: the block starts with output"
    while lines:
        number, line = lines.pop(0)
        command = [line.removeprefix("$ ")]
        while command[-1].endswith("\\"):
            command.append(lines.pop(0)[1])
        output = []
        while lines and not lines[0][1].startswith("$ "):
            output.append(lines.pop(0)[1])
        yield Step("command", block.page, number, "\n".join(command), tuple(output))


def _with_snippets(code: str) -> str:
    """Insert the sections of files that mkdocs inserts."""

    def section(match: re.Match[str]) -> str:
        file = read(match["file"])
        start, end = (f"# --8<-- [{mark}:{match['section']}]\n" for mark in ("start", "end"))
        return file.split(start)[1].split(end)[0]

    return _SNIPPET.sub(section, code)
