"""Metrics of n-gram overlap: BLEU by sacrebleu, ROUGE by rouge_score."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Literal

from lorakit.metrics.checks import check_texts, requires_extra


def bleu(
    outputs: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    lowercase: bool = True,
    smoothing: Literal["exp", "none"] = "exp",
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
    scorer = BLEU(lowercase=lowercase, smooth_method=smoothing, force=True)
    return scorer.corpus_score(list(outputs), columns).score  # type: ignore[arg-type]


def rouge(
    outputs: Sequence[str], references: Sequence[Sequence[str]], *, stem: bool = True
) -> dict[str, float]:
    """Return ROUGE_1, ROUGE_2 and ROUGE_L (Lin 2004), from 0 to 1: the metrics of SAMSum.

    Each is the F-measure 2PR / (P + R) of shared words, word pairs or the longest common subsequence, by Google's
    rouge_score, which ignores case. It is the maximum over the references of an output and the mean over outputs. An
    output without words scores 0. Papers print ROUGE times 100.

    Args:
        outputs: Texts to score.
        references: One or more references for each output.
        stem: Whether to compare words of more than three letters by their stem (Porter), as option `-m` of ROUGE-1.5.5.
            The LoRA paper does not state it; most summarization papers use stems.

    Raises:
        DataError: The list of outputs is empty, or an output has no reference.
        ConfigurationError: rouge_score is not installed.
    """
    check_texts(outputs, references)
    with requires_extra("train"):
        from rouge_score.rouge_scorer import RougeScorer
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


def text_scores(
    outputs: Sequence[str], references: Sequence[Sequence[str]], *, lowercase: bool = True
) -> dict[str, float]:
    """Return corpus BLEU and mean ROUGE-L, both from 0 to 100, against any number of references per output.

    See :func:`bleu` and, without stemming, :func:`rouge`. With `lowercase`, BLEU equals that of the E2E NLG Challenge,
    except for outputs of fewer than four tokens. ROUGE-L always ignores case.

    Raises:
        DataError: The list of outputs is empty, or an output has no reference.
    """
    return {
        "bleu": bleu(outputs, references, lowercase=lowercase),
        "rouge_l": 100 * rouge(outputs, references, stem=False)["ROUGE_L"],
    }
