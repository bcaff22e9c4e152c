"""Metrics of the data-to-text tasks E2E NLG, WebNLG and DART."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lorakit.metrics.captions import cider, rouge_l
from lorakit.metrics.checks import check_texts, requires_extra
from lorakit.metrics.edit_rate import edit_rate
from lorakit.metrics.java import find_java
from lorakit.metrics.meteor import meteor
from lorakit.metrics.mteval import bleu_and_nist
from lorakit.metrics.overlap import bleu
from lorakit.metrics.penn_treebank import ptb_tokens

WITHOUT_JAVA = " (without Java)"
"""Suffix of a score that Python computed instead of the official Java program."""

WEBNLG_REFERENCES = 6
"""Number of references per output that the paper's WebNLG and DART scores use."""


def e2e(
    outputs: Sequence[str], references: Sequence[Sequence[str]], *, java: bool | None = None
) -> dict[str, float]:
    """Return the scores of the E2E NLG Challenge, equal to `measure_scores.py -p` of tuetschek/e2e-metrics.

    - BLEU, from 0 to 1, and NIST, from 0 up: :func:`lorakit.metrics.mteval.bleu_and_nist`.
    - METEOR, from 0 to 1: :func:`lorakit.metrics.meteor.meteor`.
    - ROUGE_L, from 0 to 1, and CIDEr, from 0 to 10: :mod:`lorakit.metrics.captions`.

    METEOR, ROUGE_L and CIDEr use Penn Treebank tokens in lower case without punctuation. The paper's Table 3 shows
    BLEU, METEOR and ROUGE-L times 100.

    Args:
        outputs: Texts to score.
        references: One or more references for each output; their number may differ.
        java: Whether METEOR and the tokenizer run in Java, as in the official scorer; None uses Java if it is
            installed. Without Java, the names of METEOR, ROUGE_L and CIDEr end in " (without Java)"; the guide shows
            the differences.

    Raises:
        DataError: The list of outputs is empty, an output has no reference, or a value is not text.
        ConfigurationError: The `metrics` extra is not installed, or Java is required and not installed.
        LorakitError: Java failed or timed out.
    """
    check_texts(outputs, references)
    runtime = find_java(java)
    bleu4, nist = bleu_and_nist(outputs, references)
    tokens = iter(
        ptb_tokens([*outputs, *(text for group in references for text in group)], runtime)
    )
    output_tokens = [next(tokens) for _ in outputs]
    reference_tokens = [[next(tokens) for _ in group] for group in references]
    suffix = "" if runtime else WITHOUT_JAVA
    return {
        "BLEU": bleu4,
        "NIST": nist,
        f"METEOR{suffix}": meteor(output_tokens, reference_tokens, runtime),
        f"ROUGE_L{suffix}": rouge_l(output_tokens, reference_tokens),
        f"CIDEr{suffix}": cider(output_tokens, reference_tokens),
    }


def webnlg(
    outputs: Sequence[str], references: Sequence[Sequence[str]], *, java: bool | None = None
) -> dict[str, float]:
    """Return the scores of WebNLG and DART, equal to WebNLG/GenerationEval as the LoRA paper runs it.

    Only TER differs: GenerationEval includes an empty line after the last output, whose TER is 1, in its mean.

    As in the paper's code, texts are lower-cased and split at every character that is not a letter, digit or
    underscore, and only the first six references of an output count.

    - BLEU, from 0 to 100: that of multi-bleu-detok.perl, which equals sacrebleu without smoothing.
    - METEOR, from 0 to 1: :func:`lorakit.metrics.meteor.meteor` of nltk's Treebank tokens.
    - TER, from 0 up, lower is better: the mean of :func:`lorakit.metrics.edit_rate.edit_rate` of the same tokens.

    Args:
        outputs: Texts to score.
        references: One or more references for each output; their number may differ.
        java: As for :func:`e2e`. Without Java, the name of METEOR ends in " (without Java)".

    Raises:
        DataError: The list of outputs is empty, an output has no reference, or a value is not text.
        ConfigurationError: The `metrics` extra is not installed, or Java is required and not installed.
        LorakitError: Java failed or timed out.
    """
    check_texts(outputs, references)
    runtime = find_java(java)
    texts = [_spaced(output) for output in outputs]
    groups = [[_spaced(text) for text in group[:WEBNLG_REFERENCES]] for group in references]
    output_tokens = [_treebank(text) for text in texts]
    reference_tokens = [[_treebank(text) for text in group] for group in groups]
    rates = [
        edit_rate(output.split(), [text.split() for text in group])
        for output, group in zip(output_tokens, reference_tokens, strict=True)
    ]
    return {
        "BLEU": bleu(texts, groups, smoothing="none"),
        f"METEOR{'' if runtime else WITHOUT_JAVA}": meteor(
            output_tokens, reference_tokens, runtime
        ),
        "TER": sum(rates) / len(rates),
    }


def _spaced(text: str) -> str:
    """Lower-case a text and put spaces around every character that is not part of a word."""
    return " ".join(re.sub(r"(\W)", r" \1 ", text.lower()).split())


def _treebank(text: str) -> str:
    with requires_extra("metrics"):
        from nltk.tokenize import word_tokenize
    # preserve_line: splitting into sentences needs a download, and `_spaced` has already separated full stops.
    return " ".join(word_tokenize(text, preserve_line=True))
