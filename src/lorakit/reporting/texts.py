"""Texts of samples in pieces: words that differ, special tokens, the middle that a page folds."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

LONGEST = 800
"""Most characters of a text that a page shows in full."""
START, END = 240, 360
"""Characters shown at the start and at the end of a longer text. The end of a prompt is what the model answers."""
COMPARED = 2_000
"""Most words, blanks and punctuation marks of two texts together that are compared. For texts that repeat themselves,
the time grows with the cube of this number, to a second or two."""


@dataclass(frozen=True)
class Piece:
    """A part of a text."""

    text: str
    changed: bool = False
    """Whether the other text lacks it."""
    special: bool = False
    """Whether it is a special token of the tokenizer."""


def plain(text: str) -> tuple[Piece, ...]:
    """Return the pieces of a text without marked changes."""
    return (Piece(text),) if text else ()


def compared(before: str, after: str) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    """Return both texts in pieces, with the words marked that only one of them has.

    Texts of more than `COMPARED` words together have no marks.
    """
    one, other = _words(before), _words(after)
    if len(one) + len(other) > COMPARED:
        return plain(before), plain(after)
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


def with_special(pieces: Sequence[Piece], tokens: Sequence[str]) -> tuple[Piece, ...]:
    """Return the pieces with the tokenizer's special `tokens` in pieces of their own, except inside changed ones."""
    if not tokens:
        return tuple(pieces)
    longest_first = sorted(tokens, key=len, reverse=True)
    pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
    split: list[Piece] = []
    for piece in pieces:
        if piece.changed:
            split.append(piece)
        else:  # every second part is a token
            parts = enumerate(pattern.split(piece.text))
            split += [Piece(part, special=i % 2 == 1) for i, part in parts if part]
    return tuple(split)


def fold(pieces: Sequence[Piece]) -> tuple[list[Piece], list[Piece], list[Piece]]:
    """Return the start, the middle and the end of a text; only a text above `LONGEST` characters has the last two."""
    if length(pieces) <= LONGEST:
        return list(pieces), [], []
    start, rest = _cut(pieces, START)
    return start, *_cut(rest, length(rest) - END)


def length(pieces: Sequence[Piece]) -> int:
    """Return the number of characters."""
    return sum(len(piece.text) for piece in pieces)


def _cut(pieces: Sequence[Piece], count: int) -> tuple[list[Piece], list[Piece]]:
    """Return the first `count` characters, and the rest."""
    head: list[Piece] = []
    tail: list[Piece] = []
    for piece in pieces:
        for side, text in ((head, piece.text[:count]), (tail, piece.text[count:])):
            if text:
                side.append(replace(piece, text=text))
        count = max(0, count - len(piece.text))
    return head, tail


def _marked(text: str) -> list[Piece]:
    """Mark a text as changed, except for the whitespace around it."""
    core = text.strip()
    before, _, after = text.partition(core) if core else (text, "", "")
    return [Piece(before), Piece(core, changed=True), Piece(after)]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|\s+|[^\w\s]", text)
