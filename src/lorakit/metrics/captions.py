"""ROUGE-L and CIDEr by pycocoevalcap, the COCO caption evaluation, as in the E2E scorer."""

from __future__ import annotations

from collections.abc import Sequence

from lorakit.metrics.checks import requires_extra


def rouge_l(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the mean ROUGE-L, from 0 to 1, of texts whose tokens are joined by spaces.

    ROUGE-L = (1 + b^2) P R / (R + b^2 P) with b = 1.2. P and R are the length of the longest common subsequence divided
    by that of the output and of the reference. Each is the maximum over the references.
    """
    with requires_extra("metrics"):
        from pycocoevalcap.rouge.rouge import Rouge
    scorer = Rouge()
    scores = [
        float(scorer.calc_score([output], group))
        for output, group in zip(outputs, references, strict=True)
    ]
    return sum(scores) / len(scores)


def cider(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the CIDEr-D (Vedantam et al. 2015), from 0 to 10, of texts whose tokens are joined by spaces.

    10 times the mean over n = 1..4, references and outputs of cos(output, reference) * exp(-(difference of
    lengths)^2 / (2 * 6^2)). The vectors are tf-idf weighted n-gram counts, with clipped matches. The idf weight of an
    n-gram is log(number of outputs / number of outputs whose references have it). A single output, or identical
    references for all outputs, therefore score 0.
    """
    with requires_extra("metrics"):
        from pycocoevalcap.cider.cider import Cider
    if not any(reference.strip() for group in references for reference in group):
        return 0.0  # the scorer fails without any n-gram
    score, _ = Cider().compute_score(
        {i: list(group) for i, group in enumerate(references)},
        {i: [output] for i, output in enumerate(outputs)},
    )
    return float(score)
