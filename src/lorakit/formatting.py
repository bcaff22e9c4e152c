"""Numbers, sizes, durations, counts and shares as text, in decimal units; and text of untrusted files.

Pages, tables, sentences, cards and the command line use them, so that a value has the same digits everywhere.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakit.file_names import CONFIG


def number(value: float, *, sign: bool = False) -> str:
    """Return an integer in full, another number with four significant digits: 1,234, 1.453, 0.05000, 12,346, 1.2e-05.

    `sign` writes the plus of a positive number.
    """
    plus = "+" if sign else ""
    rounded = abs(float(f"{value:.4g}")) if math.isfinite(value) else value
    if isinstance(value, int) or 1e4 <= rounded < 1e15:
        return f"{value:{plus},.0f}"
    if 1e-3 <= rounded < 1e4:
        return f"{value:{plus}#.4g}".rstrip(".")
    return f"{value:{plus}.4g}"


def size(count: float) -> str:
    """Return a number of bytes in the largest unit that fits: 1.84 MB."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 999.5:
            return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} PB"


def duration(seconds: float) -> str:
    """Return `seconds` as 45s, 12m 03s or 2h 05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


def short_duration(seconds: float) -> str:
    """Return `seconds` as 85 ms or 4.2 s; from a minute on like `duration`."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 60 else duration(seconds)


def rounded_count(count: float) -> str:
    """Return a count as 460.8 thousand, 135 million or 1.236 billion."""
    for least, word in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if count >= least:
            return f"{count / least:.4g} {word}"
    return f"{count:.0f}"


def counted(count: int, noun: str) -> str:
    """Return a count with its noun: 1 sample, 1,200 samples."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listed(names: Sequence[str], most: int = 20) -> str:
    """Return names as a, b, c; of a long list the first ones and the number of the others."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most:,} more"


def shell_command(words: Sequence[str]) -> str:
    """Return the command line of these words, quoted for the system's shell."""
    if sys.platform == "win32":
        from subprocess import list2cmdline  # cmd.exe does not remove single quotes

        return list2cmdline(words)
    return shlex.join(words)


def resume_command(
    run: Path, settings: Mapping[str, Any] | None = None, *, start: Sequence[str] = ("lorakit",)
) -> str:
    """Return the shell command that resumes the run in a folder.

    Args:
        run: The folder.
        settings: Settings by dotted name that override its config.yaml; by default the folder, which may have moved.
        start: The words before `train`.
    """
    config = run / CONFIG
    options = [
        word
        for name, value in ({"output": str(run)} if settings is None else settings).items()
        for word in (f"--{name}", value if isinstance(value, str) else json.dumps(value))
    ]
    return shell_command([*start, "train", "--config", str(config), "--resume", *options])


def percentage(part: float, whole: float = 1.0, *, sign: bool = False) -> str:
    """Return a share in percent, with two significant digits below 10 %; `sign` writes the plus of a positive one."""
    percent = 100 * part / whole
    plus = "+" if sign else ""
    return f"{percent:{plus}.1f} %" if abs(percent) >= 10 else f"{percent:{plus}.2g} %"


def number_range(numbers: Iterable[float]) -> str:
    """Return the smallest and the largest number as 2 to 1,024, or the only number."""
    numbers = sorted(numbers)
    low, high = number(numbers[0]), number(numbers[-1])
    return low if low == high else f"{low} to {high}"


_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories: control, format (bidirectional overrides), lone surrogates, and separators of lines."""
_NOT_XML = "\ufffe\uffff"
"""Unassigned characters that XML, and so SVG, cannot hold."""
_JOINERS = "\u200c\u200d"
"""Format characters that Persian, Hindi and emoji need."""


def visible(text: str, *, keep: str = "") -> str:
    """Return text with the characters escaped that could control a terminal, forge a line of output or break an SVG.

    The escapes are those of JSON, so that JSON stays valid. `keep` lists characters to leave as they are.
    """
    if text.isprintable():
        return text
    return "".join(_escaped(c) if _is_hidden(c) and c not in keep + _JOINERS else c for c in text)


def _is_hidden(character: str) -> bool:
    return unicodedata.category(character) in _HIDDEN or character in _NOT_XML


def _escaped(character: str) -> str:
    return "\\u007f" if character == "\x7f" else json.dumps(character)[1:-1]
