"""Overlap of words with references: BLEU by sacrebleu, ROUGE by rouge_score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lorakit.metrics.checks import check_texts, missing_package


def bleu(
    outputs: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    lowercase: bool = True,
    smoothing: Literal["exp", "none"] = "exp",
) -> float:
    """Return the corpus BLEU of Papineni et al. 2002, from 0 to 100, by sacrebleu with the 13a tokenizer.

    BLEU = BP * exp(mean over n = 1..4 of log p_n), where p_n is the share of the outputs' n-grams that stand in a
    reference, and BP = min(1, exp(1 - r/c)) compares the outputs' length c with that of the closest references, r.

    Args:
        outputs: The texts to score.
        references: For each of them one or more references; their number may differ.
        lowercase: Whether upper and lower case are the same.
        smoothing: What to do where no n-gram of some length matches: `exp` halves a small precision as sacrebleu does
            by default; with `none` BLEU is then 0, as in multi-bleu-detok.perl.

    Raises:
        DataError: There are no outputs, or one has no reference.
        ConfigurationError: sacrebleu is not installed.
    """
    check_texts(outputs, references)
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise missing_package(error, "train") from None
    most = max(map(len, references))
    # sacrebleu takes references by column; None fills the rows that have fewer.
    columns = [[r[i] if i < len(r) else None for r in references] for i in range(most)]
    # force: it would log a warning where texts look tokenized, which those of WebNLG's scorer are on purpose.
    scorer = BLEU(lowercase=lowercase, smooth_method=smoothing, force=True)
    return scorer.corpus_score(list(outputs), columns).score  # type: ignore[arg-type]


def rouge(
    outputs: Sequence[str], references: Sequence[Sequence[str]], *, stem: bool = True
) -> dict[str, float]:
    """Return ROUGE_1, ROUGE_2 and ROUGE_L (Lin 2004), from 0 to 1: the metrics of SAMSum.

    Each is the F-measure 2PR / (P + R) of the words, pairs of words, or longest common subsequence that output and
    reference share, by Google's rouge_score, which compares in lower case; for each output with the reference it fits
    best, then the mean over outputs. An output without words scores 0. Papers print it times 100.

    Args:
        outputs: The texts to score.
        references: For each of them one or more references.
        stem: Whether words of more than three letters are compared by their stem (Porter), as option `-m` of
            ROUGE-1.5.5 does. The LoRA paper does not say; summarization papers mostly do.

    Raises:
        DataError: There are no outputs, or one has no reference.
        ConfigurationError: rouge_score is not installed.
    """
    check_texts(outputs, references)
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise missing_package(error, "train") from None
    names = {"ROUGE_1": "rouge1", "ROUGE_2": "rouge2", "ROUGE_L": "rougeL"}
    scorer = RougeScorer(list(names.values()), use_stemmer=stem)
    scores = [
        [scorer.score(reference, output) for reference in group]
        for output, group in zip(outputs, references, strict=True)
    ]
    return {
        name: sum(max(score[theirs].fmeasure for score in group) for group in scores) / len(scores)
        for name, theirs in names.items()
    }


def text_scores(
    outputs: Sequence[str], references: Sequence[Sequence[str]], *, lowercase: bool = True
) -> dict[str, float]:
    """Return corpus BLEU and mean ROUGE-L, both from 0 to 100, against any number of references per output.

    See :func:`bleu` and, without stemming, :func:`rouge`. In lower case BLEU is also
    that of the E2E NLG Challenge, but for outputs of fewer than four tokens; ROUGE-L is always in lower case.

    Raises:
        DataError: There are no outputs, or one has no reference.
    """
    return {
        "bleu": bleu(outputs, references, lowercase=lowercase),
        "rouge_l": 100 * rouge(outputs, references, stem=False)["ROUGE_L"],
    }
