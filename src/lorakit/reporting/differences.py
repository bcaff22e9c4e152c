"""Two texts side by side, with the words that only one of them has."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

LONGEST = 800
"""Letters shown of a text."""


@dataclass(frozen=True)
class Piece:
    """A stretch of a text."""

    text: str
    changed: bool = False
    """Whether the other text has it not."""


def shortened(text: str, most: int = LONGEST) -> str:
    """The text, or its beginning and a sign that there is more."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def plain(text: str) -> tuple[Piece, ...]:
    """A text that is compared with none."""
    return (Piece(shortened(text)),)


def compared(before: str, after: str) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    """Both texts in pieces, word by word: what they share, and what only one has."""
    one, other = _words(shortened(before)), _words(shortened(after))
    # Blanks are left out of the search, or a blank in common would tear two changed phrases into words.
    matcher = difflib.SequenceMatcher(lambda word: word.isspace(), one, other, autojunk=False)
    left: list[Piece] = []
    right: list[Piece] = []
    for what, i1, i2, j1, j2 in matcher.get_opcodes():
        for pieces, words in ((left, one[i1:i2]), (right, other[j1:j2])):
            pieces += _marked("".join(words)) if what != "equal" else [Piece("".join(words))]
    return tuple(filter(_is_there, left)), tuple(filter(_is_there, right))


def _marked(text: str) -> list[Piece]:
    """A changed stretch; the blanks around it are no part of the change."""
    core = text.strip()
    before, _, after = text.partition(core) if core else (text, "", "")
    return [Piece(before), Piece(core, changed=True), Piece(after)]


def _is_there(piece: Piece) -> bool:
    return bool(piece.text)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|\s+|[^\w\s]", text)
