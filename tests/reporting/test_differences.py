from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.reporting.differences import LONGEST, compared, plain

TEXTS = st.text(alphabet="ab c.\n", max_size=40)


@given(TEXTS, TEXTS)
def test_pieces_make_up_the_texts_and_the_unmarked_are_shared(before, after) -> None:
    left, right = compared(before, after)
    assert "".join(piece.text for piece in left) == before
    assert "".join(piece.text for piece in right) == after
    shared = [
        "".join("".join(p.text for p in side if not p.changed).split()) for side in (left, right)
    ]
    assert shared[0] == shared[1]


@pytest.mark.parametrize(
    ("before", "after", "marked"),
    [
        ("Return the name.", "Return the size.", (["name"], ["size"])),
        ("same words", "same words", ([], [])),
        ("", "new", ([], ["new"])),
    ],
)
def test_the_words_that_differ_are_marked(before, after, marked) -> None:
    sides = compared(before, after)
    found = tuple([piece.text for piece in side if piece.changed] for side in sides)
    assert found == marked


def test_long_texts_are_cut_and_say_so() -> None:
    (piece,) = plain("x" * 5000)
    assert len(piece.text) == LONGEST
    assert piece.text.endswith("…")
