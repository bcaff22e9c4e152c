"""ROUGE-L and CIDEr as COCO's caption evaluation computes them, by pycocoevalcap; the E2E scorer takes them from it."""

from __future__ import annotations

from collections.abc import Sequence

from lorakit.metrics.checks import missing_package


def rouge_l(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the mean ROUGE-L, from 0 to 1, of texts whose tokens are joined by spaces.

    (1 + b^2) P R / (R + b^2 P) with b = 1.2, where P and R are the longest common subsequence as a share of the output
    and of the reference: the greatest P and the greatest R that any of the references gives.
    """
    try:
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        raise missing_package(error, "metrics") from None
    scorer = Rouge()
    scores = [
        float(scorer.calc_score([output], group))
        for output, group in zip(outputs, references, strict=True)
    ]
    return sum(scores) / len(scores)


def cider(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the CIDEr-D (Vedantam et al. 2015), from 0 to 10, of texts whose tokens are joined by spaces.

    10 times the mean, over n = 1..4, references and outputs, of the cosine of output and reference as vectors of
    n-grams weighted by tf-idf (matches clipped), times exp(-(difference of lengths)^2 / (2 * 6^2)). An n-gram weighs
    the logarithm of the number of outputs over the number of those whose references have it, so a single output, or
    references that all agree, give 0.
    """
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError as error:
        raise missing_package(error, "metrics") from None
    if not any(reference.strip() for group in references for reference in group):
        return 0.0  # the scorer fails where there is not one n-gram
    score, _ = Cider().compute_score(
        {i: list(group) for i, group in enumerate(references)},
        {i: [output] for i, output in enumerate(outputs)},
    )
    return float(score)
