"""Compare the output of a command with the page, apart from what differs between models and machines.

Both sides pass through the same patterns, in this order. On a page, a line `...` stands for any number of lines.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

PATTERNS: dict[str, tuple[str, str]] = {
    "MODULE": (r"\b\w+(\.\w+)*\.\d+(\.\w+)+", "MODULE"),
    "PATH": (r"(?<![\w.])/[\w./-]+", "PATH"),
    "SIZE": (r"\b\d[\d,.]* (bytes|[kMGT]B)\b", "SIZE"),
    "TIME": (r"\b\d[\d,.]* ?(ms|s|min|m|h)\b", "TIME"),
    "NUMBER": (r"(?<![\w.-])-?\d[\d,]*(\.\d+)?(e[+-]?\d+)?(?![\w-])", "NUMBER"),
    "RANGE": (r"NUMBER to NUMBER", "NUMBER"),
    "BAR": (r"█+", "BAR"),
    "SPACE": (r"\s+", " "),
}
"""What differs, by name: a pattern and its replacement.

MODULE: a layer with its number. PATH: an absolute path. RANGE: a column's smallest and largest value, a single number
where they are equal. SPACE: the width of a column.
"""


def normalised(lines: Sequence[str]) -> list[str]:
    """Return the lines with each pattern replaced, without trailing spaces and empty lines at the end."""
    text = "\n".join(lines).rstrip()
    return [_normalised(line) for line in text.splitlines()]


def difference(page: Sequence[str], printed: Sequence[str]) -> str:
    """Return how the output differs from the page, or an empty string."""
    expected, found = normalised(page), normalised(printed)
    if _matches(expected, found):
        return ""
    shown = "\n".join(f"    {line}" for line in printed)
    missing = next(
        (raw for raw, line in zip(page, expected, strict=False) if line not in found), ""
    )
    reason = f"no line like {missing!r}" if missing not in ("", "...") else "other lines"
    return f"the output differs from the page ({reason}):\n{shown}"


def _normalised(line: str) -> str:
    for pattern, replacement in PATTERNS.values():
        line = re.sub(pattern, replacement, line)
    return line.strip()


def _matches(expected: list[str], found: list[str]) -> bool:
    if not expected:
        return not found
    if expected[0] == "...":
        return any(_matches(expected[1:], found[skipped:]) for skipped in range(len(found) + 1))
    return bool(found) and expected[0] == found[0] and _matches(expected[1:], found[1:])
