"""Translation edit rate as in WebNLG's scorer.

sacrebleu's TER follows Tercom, which limits the shifts and sums edits over the corpus. WebNLG/GenerationEval uses the
mean of pyter3's rate per sentence. pyter3 is slow and unmaintained, so this module implements its definition with
rapidfuzz's edit distance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lorakit.metrics.checks import requires_extra


def edit_rate(output: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the minimum TER (Snover et al. 2006) of the words of an output over the references.

    TER = (shifts + insertions + deletions + substitutions) / words of the reference. A shift moves a phrase of the
    output to its place in the reference. Greedy search applies the shift that reduces the edit distance most, until
    none does; of equal shifts, the one whose result is last in alphabetical order. TER is 0 for equal texts, may
    exceed 1, and is 1 for a reference without words.

    Raises:
        ConfigurationError: rapidfuzz is not installed.
    """
    with requires_extra("metrics"):
        from rapidfuzz.distance.Levenshtein import distance
    return min(_edit_rate(output, reference, distance) for reference in references)


def _edit_rate(output: Sequence[str], reference: Sequence[str], distance) -> float:
    if not reference:
        return 1.0
    # Encode each word as one character in alphabetical order: slicing and comparing strings is fast.
    code = {word: chr(i) for i, word in enumerate(sorted({*output, *reference}))}
    text, target = ("".join(code[word] for word in words) for words in (output, reference))
    shifts, edits = 0, distance(text, target)
    while True:
        candidates = {(-distance(shifted, target), shifted) for shifted in _shifted(text, target)}
        if not candidates or -max(candidates)[0] >= edits:
            return (shifts + edits) / len(target)
        negative_edits, text = max(candidates)
        shifts, edits = shifts + 1, -negative_edits


def _shifted(text: str, target: str) -> Iterator[str]:
    """Yield every text that results from moving a phrase of `text` to a place that it has in `target`."""
    for start, character in enumerate(text):
        for place, same in enumerate(target):
            if start == place or character != same:
                continue
            length = 1
            while (
                text[start + length : start + length + 1]
                == target[place + length : place + length + 1]
                != ""
            ):
                length += 1
            rest = text[:start] + text[start + length :]
            yield rest[:place] + text[start : start + length] + rest[place:]
