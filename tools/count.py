"""Count the lines and tokens of code by room, and compare the totals with the budget in pyproject.toml.

python tools/count.py [CHECKOUT]              print the table; status 1 above the budget
python tools/count.py CHECKOUT --files adapters   list the files of one room

A line counts if it holds code: no blank line, comment or docstring. A token counts as Python's tokenizer sees it; in
other languages a word, number or sign. Both must fall: longer lines lower the first count and not the second.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

SHIPPED = ("src", "paper")
"""Folders whose totals the budget limits."""

BESIDE = ("tests", "benchmarks", "tools", "examples")
"""Folders that are counted too."""

COMMENTS = {
    ".js": re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL),
    ".css": re.compile(r"/\*.*?\*/", re.DOTALL),
    ".html": re.compile(r"<!--.*?-->", re.DOTALL),
    ".jinja": re.compile(r"\{#.*?#\}", re.DOTALL),
    ".yaml": re.compile(r"^\s*#[^\n]*", re.MULTILINE),
}
"""The comments of each language beside Python, by the suffix of its files."""

SPACE = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


class Count(NamedTuple):
    """Code of a file or room."""

    lines: int = 0
    tokens: int = 0

    def __add__(self, other: object) -> Count:
        assert isinstance(other, Count)
        return Count(self.lines + other.lines, self.tokens + other.tokens)


def count(path: Path) -> Count:
    """Count one file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return python_code(text)
    text = COMMENTS[path.suffix].sub("", text)
    lines = sum(1 for line in text.splitlines() if line.strip())
    return Count(lines, len(re.findall(r"\w+|[^\w\s]", text)))


def python_code(text: str) -> Count:
    """Count Python code without comments and docstrings, those of attributes included."""
    strings = docstring_lines(ast.parse(text))
    lines, tokens = set(), 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT or token.type in SPACE or token.start[0] in strings:
            continue
        tokens += 1
        lines.update(range(token.start[0], token.end[0] + 1))
    return Count(len(lines), tokens)


def docstring_lines(tree: ast.AST) -> set[int]:
    """Return the lines of all statements that are only a string."""
    return {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }


def room_of(path: Path, checkout: Path) -> tuple[str, str]:
    """Return the folder and room of a file: a package of src/lorakit, or a folder of tests."""
    top, *inner = path.relative_to(checkout).parts
    inner = inner[1:] if top == "src" else inner
    is_python = path.suffix == ".py"
    room = inner[0] if len(inner) > 1 else "top"
    return top, room if is_python else f"{room} ({path.suffix[1:]})"


def files(checkout: Path) -> list[Path]:
    """Return the counted files of a checkout."""
    found = (p for top in (*SHIPPED, *BESIDE) for p in sorted((checkout / top).rglob("*")))
    return [p for p in found if p.is_file() and p.suffix in (".py", *COMMENTS)]


def main() -> int:
    """Print the table, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", nargs="?", default=Path(__file__).parents[1], type=Path)
    parser.add_argument("--files", metavar="ROOM", help="list the files of one room")
    arguments = parser.parse_args()
    checkout = arguments.checkout.resolve()
    rooms: dict[str, dict[str, Count]] = defaultdict(lambda: defaultdict(Count))
    for path in files(checkout):
        top, room = room_of(path, checkout)
        counted = count(path)
        rooms[top][room] += counted
        if room == arguments.files:
            print(f"{counted.lines:7,} {counted.tokens:9,}  {path.relative_to(checkout)}")
    shipped = Count()
    for top, counts in rooms.items():
        total = sum(counts.values(), Count())
        shipped += total if top in SHIPPED else Count()
        print(f"{top:<24}{total.lines:>8,} lines {total.tokens:>10,} tokens")
        for room, one in sorted(counts.items()) if top in SHIPPED else ():
            print(f"  {room:<22}{one.lines:>8,}       {one.tokens:>10,}")
    settings = tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))
    budget = settings.get("tool", {}).get("lorakit", {}).get("budget", {})
    limit = Count(budget.get("lines", 0), budget.get("tokens", 0))
    print(
        f"shipped {shipped.lines:,} lines, {shipped.tokens:,} tokens; budget {limit.lines:,}, ",
        end="",
    )
    print(f"{limit.tokens:,}")
    if budget and (shipped.lines > limit.lines or shipped.tokens > limit.tokens):
        print(
            "above the budget of pyproject.toml: delete something, or raise it in a commit that says what for"
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
