"""Penn Treebank tokens of texts, as the COCO caption scorers want them: lower case, without punctuation."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lorakit.errors import LorakitError
from lorakit.metrics.checks import missing_package
from lorakit.metrics.java import jar, run_java

BRACKET_NAMES = ("-LRB-", "-RRB-", "-LCB-", "-RCB-")
PUNCTUATION = {"''", "'", "``", "`", *BRACKET_NAMES, ".", "?", "!", ",", ":", "-", "--", "...", ";"}
"""What pycocoevalcap drops. Its brackets are upper case and never match the lower-case tokens, so they stay in."""

BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}

# nltk's tokenizer is made for one sentence at a time. What Stanford's does otherwise:
CURRENCY = re.compile("[\N{POUND SIGN}\N{EURO SIGN}\N{YEN SIGN}]")
APOSTROPHE = "\N{RIGHT SINGLE QUOTATION MARK}"
LOOSE_MARKS = re.compile(
    r"""(?<!\S)[.-]+(?!\d)"""  # points and hyphens before a word
    r"""|-+(?=["')\]]*(?!\S))"""  # hyphens after a word
    # points too, unless it is an initial, letters as in "u.s." or a title
    r"""|(?<![\s.(][a-z])(?<!\b(?:co|dr|jr|mr|ms|sr|st))(?<!\b(?:inc|ltd|mrs))\.+(?=["')\]]*(?!\S))"""
    "|[\N{EN DASH}\N{EM DASH}\N{HORIZONTAL ELLIPSIS}]"
)


def ptb_tokens(texts: Sequence[str], java: str | None) -> list[str]:
    """Return the tokens of each text, joined by spaces.

    With `java`, the path of a Java runtime, by Stanford's PTBTokenizer (CoreNLP 3.4.1) as pycocoevalcap calls it; else
    by nltk's Treebank tokenizer and a few rules, which give the same on the texts of E2E NLG.

    Raises:
        LorakitError: Java failed.
        ConfigurationError: pycocoevalcap or nltk is not installed.
    """
    # A line each: whatever ends a line for Java must not stand inside a text.
    lines = [" ".join(text.splitlines()) for text in texts]
    tokenized = _nltk(lines) if java is None else _stanford(lines, java)
    return [" ".join(token for token in tokens if token not in PUNCTUATION) for tokens in tokenized]


def _stanford(lines: list[str], java: str) -> list[list[str]]:
    printed = run_java(
        java,
        "-cp",
        str(jar("tokenizer", "stanford-corenlp-3.4.1.jar")),
        "edu.stanford.nlp.process.PTBTokenizer",
        "-preserveLines",
        "-lowerCase",
        "-encoding",
        "UTF-8",
        text="".join(line + "\n" for line in lines),
        timeout=60 + len(lines) / 100,
    )
    tokenized = [line.split(" ") for line in printed.removesuffix("\n").split("\n")]
    if len(tokenized) != len(lines):
        raise LorakitError(
            f"The PTB tokenizer read {len(lines)} texts and wrote {len(tokenized)}: one holds a character that it "
            "takes for the end of a line. java=False scores without it."
        )
    return tokenized


def _nltk(lines: list[str]) -> list[list[str]]:
    try:
        from nltk.tokenize import NLTKWordTokenizer
    except ImportError as error:
        raise missing_package(error, "metrics") from None
    tokenizer = NLTKWordTokenizer()
    return [
        [BRACKETS.get(token, token) for token in tokenizer.tokenize(_one_sentence(line))]
        for line in lines
    ]


def _one_sentence(text: str) -> str:
    """A text whose marks nltk's tokenizer will part from its words as Stanford's does."""
    marked = " " + CURRENCY.sub(" # ", text.lower().replace(APOSTROPHE, "'"))
    return LOOSE_MARKS.sub(" ", marked) + " ."  # so that the last word keeps a point of its own
