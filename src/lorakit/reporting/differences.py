"""Word-by-word differences between two texts."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

LONGEST = 800
"""Most characters shown of a text."""


@dataclass(frozen=True)
class Piece:
    """A part of a text."""

    text: str
    changed: bool = False
    """Whether the other text lacks it."""


def shortened(text: str) -> str:
    """Return the text, cut to `LONGEST` characters with an ellipsis at the end."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def plain(text: str) -> tuple[Piece, ...]:
    """Return the pieces of a text without marked changes."""
    return (Piece(shortened(text)),)


def compared(before: str, after: str) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    """Return both texts in pieces, with the words marked that only one of them has."""
    one, other = _words(shortened(before)), _words(shortened(after))
    # Ignore whitespace, or every common blank would split a changed phrase into words.
    matcher = difflib.SequenceMatcher(str.isspace, one, other, autojunk=False)
    left: list[Piece] = []
    right: list[Piece] = []
    for tag, i1, i2, j1, j2 in matcher.get_opcodes():
        for pieces, words in ((left, one[i1:i2]), (right, other[j1:j2])):
            text = "".join(words)
            changes = [Piece(text)] if tag == "equal" else _marked(text)
            pieces += [piece for piece in changes if piece.text]
    return tuple(left), tuple(right)


def _marked(text: str) -> list[Piece]:
    """Mark a text as changed, except for the whitespace around it."""
    core = text.strip()
    before, _, after = text.partition(core) if core else (text, "", "")
    return [Piece(before), Piece(core, changed=True), Piece(after)]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|\s+|[^\w\s]", text)
