"""Penn Treebank tokens with and without Stanford's tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorakit.metrics.penn_treebank import ptb_tokens

EXAMPLES = {
    "The Eagle's a family-friendly pub.": "the eagle 's a family-friendly pub",
    "It costs £20-25. It's near (the) river .": "it costs # 20-25 it 's near -lrb- the -rrb- river",
    'They don\'t serve "fish", but: wine!': "they do n't serve fish but wine",
    "Rated 3.5 out of 5, e.g. by J. Smith of the U.S.": "rated 3.5 out of 5 e.g. by j. smith of the u.s.",
    "": "",
    "...": "",
    "one\ntwo\u2028three\x85four": "one two three four",
}


@pytest.mark.parametrize(("text", "tokens"), EXAMPLES.items())
def test_tokens_without_java(text: str, tokens: str) -> None:
    assert ptb_tokens([text], None) == [tokens]


def test_tokens_with_java(java: str) -> None:
    assert ptb_tokens(list(EXAMPLES), java) == list(EXAMPLES.values())


@pytest.mark.slow
def test_the_two_agree_on_e2e(shared: Path, java: str) -> None:
    with open(shared / "data" / "e2e_nlg" / "test.jsonl", encoding="utf-8") as file:
        texts = [json.loads(line)["human_reference"] for line in file]
    assert ptb_tokens(texts, None) == ptb_tokens(texts, java)


@pytest.mark.slow
def test_hostile_characters_keep_their_lines(java: str) -> None:
    texts = ["a\x00b", "\ud800", "x\r\ny", "\x1c\x1d\x1e", "\ufeff", "-", "b-", "\U0001f600 c", " "]
    alone = [ptb_tokens([text], java)[0] for text in texts]
    assert ptb_tokens(texts, java) == alone
