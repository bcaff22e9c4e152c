"""Metrics of n-gram overlap: BLEU by sacrebleu, ROUGE by rouge_score."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from itertools import zip_longest
from typing import Literal

from lorakit.errors import DataError
from lorakit.metrics.checks import check_texts, requires_extra

WITHOUT_SPACES = re.compile("CJK|IDEOGRAPHIC|HIRAGANA|(HALFWIDTH )?KATAKANA|THAI|LAO|KHMER|MYANMAR")
"""Start of the Unicode names of characters whose scripts put no spaces between words."""


def bleu(
    outputs: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    lowercase: bool = True,
    smoothing: Literal["exp", "none"] = "exp",
    effective_order: bool = False,
) -> float:
    """Return the corpus BLEU of Papineni et al. 2002, from 0 to 100, by sacrebleu with the 13a tokenizer.

    BLEU = BP * exp(mean over n = 1..4 of log p_n). p_n is the fraction of the outputs' n-grams that match a reference.
    BP = min(1, exp(1 - r/c)), with the length c of the outputs and the length r of the closest references.

    Args:
        outputs: Texts to score.
        references: One or more references for each output; their number may differ.
        lowercase: Whether to ignore case.
        smoothing: How to handle a p_n of 0: `exp` replaces it by a small precision, halved each time, as sacrebleu does
            by default; with `none` BLEU is 0, as in multi-bleu-detok.perl.
        effective_order: Whether the mean leaves out the orders n above the longest output, in tokens. Without it, BLEU
            is 0 if no output has four tokens.

    Raises:
        DataError: The list of outputs is empty, or an output has no reference.
        ConfigurationError: sacrebleu is not installed.
    """
    check_texts(outputs, references)
    with requires_extra("train"):
        from sacrebleu.metrics.bleu import BLEU
    # sacrebleu expects the references by column, padded with None.
    columns = list(zip_longest(*references))
    # force: no warning about tokenized texts, which WebNLG's scorer passes on purpose.
    scorer = BLEU(
        lowercase=lowercase, smooth_method=smoothing, effective_order=effective_order, force=True
    )
    return scorer.corpus_score(list(outputs), columns).score  # type: ignore[arg-type]


def rouge(
    outputs: Sequence[str], references: Sequence[Sequence[str]], *, stem: bool = True
) -> dict[str, float]:
    """Return ROUGE_1, ROUGE_2 and ROUGE_L (Lin 2004), from 0 to 1: the metrics of SAMSum.

    Each is the F-measure 2PR / (P + R) of shared words, word pairs or the longest common subsequence, by Google's
    rouge_score, which ignores case. It is the maximum over the references of an output and the mean over outputs. Words
    consist of a-z and 0-9; other letters separate words. An output without words scores 0. Papers print ROUGE times
    100.

    Args:
        outputs: Texts to score.
        references: One or more references for each output.
        stem: Whether to compare words of more than three letters by their stem (Porter), as option `-m` of ROUGE-1.5.5.
            The LoRA paper does not state it; most summarization papers use stems.

    Raises:
        DataError: The list of outputs is empty, an output has no reference, or all references are in another script.
        ConfigurationError: rouge_score is not installed.
    """
    check_texts(outputs, references)
    with requires_extra("train"):
        from rouge_score.rouge_scorer import RougeScorer
    texts = [text for group in references for text in group]
    lettered = next((text for text in texts if any(map(str.isalpha, text))), None)
    if lettered is not None and not any(re.search("[a-z0-9]", text.lower()) for text in texts):
        raise DataError(
            f"No reference has a word of a-z or 0-9, the only characters that ROUGE compares; one is {lettered!r:.80}. "
            "The rouge_l of task completion compares all letters: lorakit train and evaluate, --data.task completion."
        )
    names = {"ROUGE_1": "rouge1", "ROUGE_2": "rouge2", "ROUGE_L": "rougeL"}
    scorer = RougeScorer(list(names.values()), use_stemmer=stem)
    scores = [
        [scorer.score(reference, output) for reference in group]
        for output, group in zip(outputs, references, strict=True)
    ]
    return {
        name: sum(max(score[key].fmeasure for score in group) for group in scores) / len(scores)
        for name, key in names.items()
    }


class _Words:
    """Tokenizer of the generic ROUGE-L. It splits texts in a-z and 0-9 as rouge_score does.

    A word consists of letters, digits and combining marks. In scripts without spaces each character is a word, as in a
    text without any word ("+").
    """

    @staticmethod
    def tokenize(text: str) -> list[str]:
        """Return the words of a text in lower case."""
        return "".join(map(_in_words, text.lower())).split() or list("".join(text.split()))


@cache
def _in_words(character: str) -> str:
    """Return a character of a word, with spaces around it where it is a word, or a space for any other character."""
    if not character.isalnum() and unicodedata.category(character)[0] != "M":
        return " "
    is_word = WITHOUT_SPACES.match(unicodedata.name(character, ""))
    return f" {character} " if is_word else character


def text_scores(
    outputs: Sequence[str], references: Sequence[Sequence[str]], *, lowercase: bool = True
) -> dict[str, float]:
    """Return corpus BLEU and mean ROUGE-L, both from 0 to 100, against any number of references per output.

    With `lowercase`, BLEU (:func:`bleu`) equals that of the E2E NLG Challenge, except for outputs of fewer than four
    tokens: if all are that short, it has the effective order. ROUGE-L is that of :func:`rouge` without stemming, for
    all scripts: its words may have any letters, and each character of a script without spaces (Chinese, Japanese, Thai,
    Lao, Khmer, Burmese) counts as a word. It always ignores case.

    Raises:
        DataError: The list of outputs is empty, or an output has no reference.
    """
    corpus_bleu = bleu(outputs, references, lowercase=lowercase, effective_order=True)
    with requires_extra("train"):
        from rouge_score.rouge_scorer import RougeScorer
    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    best = [
        max(scorer.score(reference, output)["rougeL"].fmeasure for reference in group)
        for output, group in zip(outputs, references, strict=True)
    ]
    return {"bleu": corpus_bleu, "rouge_l": 100 * (sum(best) / len(best))}
