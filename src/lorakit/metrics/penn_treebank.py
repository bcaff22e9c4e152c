"""Penn Treebank tokens for the COCO caption scorers: lower case, without punctuation."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lorakit.errors import LorakitError
from lorakit.metrics.checks import requires_extra
from lorakit.metrics.java import jar, run_java

PUNCTUATION = {
    *("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-"),
    *(".", "?", "!", ",", ":", "-", "--", "...", ";"),
}
"""Tokens that pycocoevalcap drops. Its upper-case bracket names never match lower-case tokens, so brackets stay."""

BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}

# nltk's tokenizer expects a single sentence. These patterns reproduce Stanford's tokens for a whole text.
CURRENCY = re.compile("[\N{POUND SIGN}\N{EURO SIGN}\N{YEN SIGN}]")
APOSTROPHE = "\N{RIGHT SINGLE QUOTATION MARK}"
LOOSE_MARKS = re.compile(
    r"""(?<!\S)[.-]+(?!\d)"""  # full stops and hyphens before a word
    r"""|-+(?=["')\]]*(?!\S))"""  # hyphens after a word
    # full stops after a word, except after an initial, in "u.s." or after a title
    r"""|(?<![\s.(][a-z])(?<!\b(?:co|dr|jr|mr|ms|sr|st))(?<!\b(?:inc|ltd|mrs))\.+(?=["')\]]*(?!\S))"""
    "|[\N{EN DASH}\N{EM DASH}\N{HORIZONTAL ELLIPSIS}]"
)


def ptb_tokens(texts: Sequence[str], java: str | None) -> list[str]:
    """Return the tokens of each text, joined by spaces.

    With `java`, the path of a Java runtime, run Stanford's PTBTokenizer (CoreNLP 3.4.1) as pycocoevalcap does. Without
    it, use nltk's Treebank tokenizer and a few rules, which give the same tokens on E2E NLG.

    Raises:
        LorakitError: Java failed.
        ConfigurationError: pycocoevalcap or nltk is not installed.
    """
    # One line per text: remove the characters that end a line in Java.
    lines = [" ".join(text.splitlines()) for text in texts]
    tokenized = _nltk(lines) if java is None else _stanford(lines, java)
    return [" ".join(token for token in tokens if token not in PUNCTUATION) for tokens in tokenized]


def _stanford(lines: list[str], java: str) -> list[list[str]]:
    printed = run_java(
        java,
        "-cp",
        str(jar("tokenizer", "stanford-corenlp-3.4.1.jar")),
        "edu.stanford.nlp.process.PTBTokenizer",
        *("-preserveLines", "-lowerCase", "-encoding", "UTF-8"),
        text="".join(line + "\n" for line in lines),
        timeout=60 + len(lines) / 100,
    )
    tokenized = [line.split(" ") for line in printed.removesuffix("\n").split("\n")]
    if len(tokenized) != len(lines):
        raise LorakitError(
            f"The PTB tokenizer read {len(lines)} texts and wrote {len(tokenized)}: a text contains a character that "
            "it treats as the end of a line. Score without Java: java=False."
        )
    return tokenized


def _nltk(lines: list[str]) -> list[list[str]]:
    with requires_extra("metrics"):
        from nltk.tokenize import NLTKWordTokenizer
    tokenizer = NLTKWordTokenizer()
    return [
        [BRACKETS.get(token, token) for token in tokenizer.tokenize(_one_sentence(line))]
        for line in lines
    ]


def _one_sentence(text: str) -> str:
    """Rewrite a text as one sentence, so that nltk separates punctuation as Stanford's tokenizer does."""
    marked = " " + CURRENCY.sub(" # ", text.lower().replace(APOSTROPHE, "'"))
    # nltk splits this full stop, not that of the last word.
    return LOOSE_MARKS.sub(" ", marked) + " ."
