from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.reporting.texts import END, LONGEST, Piece, compared, fold, plain, with_special

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


def test_texts_of_very_many_words_are_not_compared() -> None:
    before, after = "a b " * 300, "a c " * 300
    assert compared(before, after) == (plain(before), plain(after))
    words = [f"different{i}" for i in range(400)]
    left, right = compared(" ".join([*words, "before"]), " ".join([*words, "after"]))
    assert [piece.text for piece in (*left, *right) if piece.changed] == ["before", "after"]


def text_of(pieces) -> str:
    return "".join(piece.text for piece in pieces)


def test_a_long_text_keeps_its_start_and_end_and_folds_the_middle() -> None:
    words = [Piece(f"word{i} ", changed=i % 3 == 0) for i in range(LONGEST // 4)]
    start, middle, end = fold(words)
    assert text_of(start) + text_of(middle) + text_of(end) == text_of(words)
    assert len(text_of(end)) == END
    assert text_of(start).startswith("word0 word1")
    changed = [p.text.strip() for part in (start, middle, end) for p in part if p.changed]
    assert "word3" in changed
    assert not {"word1", "word2"} & set(changed)


def test_a_text_of_the_longest_length_is_not_folded() -> None:
    assert fold(plain("x" * LONGEST)) == ([*plain("x" * LONGEST)], [], [])
    assert all(fold(plain("x" * (LONGEST + 1))))


def test_special_tokens_are_those_of_the_tokenizer() -> None:
    pieces = plain("<s>[INST] a<|b|></s>")
    found = with_special(pieces, ["<s>", "</s>", "[INST]"])
    assert [p.text for p in found if p.special] == ["<s>", "[INST]", "</s>"]
    assert text_of(found) == text_of(pieces)
    assert with_special(pieces, []) == pieces


def test_changed_words_keep_their_mark() -> None:
    pieces = (Piece("<s>", changed=True), Piece("</s>"))
    assert with_special(pieces, ["<s>", "</s>"]) == (pieces[0], Piece("</s>", special=True))
