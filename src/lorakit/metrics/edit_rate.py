"""Translation edit rate as WebNLG's scorer computes it.

sacrebleu's TER follows Tercom, which bounds the shifts and sums edits over the corpus; WebNLG/GenerationEval takes
pyter3's rate of each sentence, and their mean. pyter3 is slow and unmaintained, so its definition is written here on
rapidfuzz's edit distance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lorakit.metrics.checks import missing_package


def edit_rate(output: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the TER (Snover et al. 2006) of the words of an output with the reference where it is least.

    TER = (shifts + insertions, deletions and substitutions) / words of the reference. A shift moves a phrase that
    stands in the reference to its place there; the one that most reduces the rest is taken as long as there is one,
    and of several the one whose result comes last in alphabetical order. TER is 0 for equal texts and may exceed 1;
    with a reference without words it is 1.

    Raises:
        ConfigurationError: rapidfuzz is not installed.
    """
    try:
        from rapidfuzz.distance.Levenshtein import distance
    except ImportError as error:
        raise missing_package(error, "metrics") from None
    return min(_edit_rate(output, reference, distance) for reference in references)


def _edit_rate(output: Sequence[str], reference: Sequence[str], distance) -> float:
    if not reference:
        return 1.0
    # A character for each word, in the words' own order, so that texts can be sliced, compared and ordered fast.
    code = {word: chr(i) for i, word in enumerate(sorted({*output, *reference}))}
    text, target = ("".join(code[word] for word in words) for words in (output, reference))
    shifts, edits = 0, distance(text, target)
    while True:
        candidates = {(-distance(shifted, target), shifted) for shifted in _shifted(text, target)}
        if not candidates or -max(candidates)[0] >= edits:
            return (shifts + edits) / len(target)
        rest, text = max(candidates)
        shifts, edits = shifts + 1, -rest


def _shifted(text: str, target: str) -> Iterator[str]:
    """Every text that comes from moving a phrase of `text` to a place where it stands in `target`."""
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
