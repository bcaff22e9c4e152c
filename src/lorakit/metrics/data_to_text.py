"""The metrics of E2E NLG, WebNLG and DART: texts that say what a set of facts says."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lorakit.metrics.captions import cider, rouge_l
from lorakit.metrics.checks import check_texts, missing_package
from lorakit.metrics.edit_rate import edit_rate
from lorakit.metrics.java import find_java
from lorakit.metrics.meteor import meteor
from lorakit.metrics.mteval import bleu_and_nist
from lorakit.metrics.overlap import bleu
from lorakit.metrics.penn_treebank import ptb_tokens

WITHOUT_JAVA = " (without Java)"
"""Ends the name of a score that the official scorer computes in Java, where Python computed it."""

WEBNLG_REFERENCES = 6
"""How many references of an output the paper's WebNLG and DART scores look at."""


def e2e(
    outputs: Sequence[str], references: Sequence[Sequence[str]], *, java: bool | None = None
) -> dict[str, float]:
    """Return the scores of the E2E NLG Challenge, as tuetschek/e2e-metrics' `measure_scores.py -p` prints them.

    - BLEU, from 0 to 1, and NIST, from 0 up: :func:`lorakit.metrics.mteval.bleu_and_nist`.
    - METEOR, from 0 to 1: :func:`lorakit.metrics.meteor.meteor`.
    - ROUGE_L, from 0 to 1, and CIDEr, from 0 to 10: :mod:`lorakit.metrics.captions`.

    The last three are of Penn Treebank tokens in lower case without punctuation. The paper's tables give BLEU, METEOR
    and ROUGE-L times 100.

    Args:
        outputs: The texts to score.
        references: For each of them one or more references; their number may differ.
        java: Whether METEOR and the tokenizer run in Java, as in the official scorer; None: where Java is installed.
            Without, METEOR, ROUGE_L and CIDEr have " (without Java)" in their names; the guide says how far off
            they are.

    Raises:
        DataError: There are no outputs, one has no reference, or something is not a text.
        ConfigurationError: The `metrics` extra, or Java where it is asked for, is not installed.
        LorakitError: Java failed, or did not answer.
    """
    check_texts(outputs, references)
    runtime = find_java(java)
    bleu4, nist = bleu_and_nist(outputs, references)
    tokens = iter(
        ptb_tokens([*outputs, *(text for group in references for text in group)], runtime)
    )
    said = [next(tokens) for _ in outputs]
    wanted = [[next(tokens) for _ in group] for group in references]
    mark = "" if runtime else WITHOUT_JAVA
    return {
        "BLEU": bleu4,
        "NIST": nist,
        f"METEOR{mark}": meteor(said, wanted, runtime),
        f"ROUGE_L{mark}": rouge_l(said, wanted),
        f"CIDEr{mark}": cider(said, wanted),
    }


def webnlg(
    outputs: Sequence[str], references: Sequence[Sequence[str]], *, java: bool | None = None
) -> dict[str, float]:
    """Return the scores of WebNLG and DART, as WebNLG/GenerationEval gives them in the LoRA paper's use of it.

    Texts are first lower-cased and split at every character that is no letter, digit or underscore, and of an output's
    references the first six count, as in the paper's code.

    - BLEU, from 0 to 100: multi-bleu-detok.perl's, which sacrebleu's equals without smoothing.
    - METEOR, from 0 to 1: :func:`lorakit.metrics.meteor.meteor`, of nltk's Treebank tokens.
    - TER, from 0 up, less is better: the mean of :func:`lorakit.metrics.edit_rate.edit_rate` of the same tokens.

    Args:
        outputs: The texts to score.
        references: For each of them one or more references; their number may differ.
        java: As for :func:`e2e`; without, METEOR has " (without Java)" in its name.

    Raises:
        DataError: There are no outputs, one has no reference, or something is not a text.
        ConfigurationError: The `metrics` extra, or Java where it is asked for, is not installed.
        LorakitError: Java failed, or did not answer.
    """
    check_texts(outputs, references)
    runtime = find_java(java)
    texts = [_spaced(output) for output in outputs]
    groups = [[_spaced(text) for text in group[:WEBNLG_REFERENCES]] for group in references]
    said = [_treebank(text) for text in texts]
    wanted = [[_treebank(text) for text in group] for group in groups]
    rates = [
        edit_rate(output.split(), [text.split() for text in group])
        for output, group in zip(said, wanted, strict=True)
    ]
    return {
        "BLEU": bleu(texts, groups, smoothing="none"),
        f"METEOR{'' if runtime else WITHOUT_JAVA}": meteor(said, wanted, runtime),
        "TER": sum(rates) / len(rates),
    }


def _spaced(text: str) -> str:
    """A text in lower case with spaces around whatever is not part of a word."""
    return " ".join(re.sub(r"(\W)", r" \1 ", text.lower()).split())


def _treebank(text: str) -> str:
    try:
        from nltk.tokenize import word_tokenize
    except ImportError as error:
        raise missing_package(error, "metrics") from None
    # preserve_line: splitting into sentences needs data to download, and points stand alone already.
    return " ".join(word_tokenize(text, preserve_line=True))
