"""METEOR 1.5 by its authors' Java program, and the closest to it that Python has."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lorakit.errors import LorakitError
from lorakit.metrics.checks import missing_package
from lorakit.metrics.java import jar, run_java

ALPHA, BETA, GAMMA = 0.85, 0.20, 0.60
"""METEOR 1.5's weights for English: of recall in the F-mean, and of the order of words."""


def meteor(outputs: Sequence[str], references: Sequence[Sequence[str]], java: str | None) -> float:
    """Return METEOR, from 0 to 1, of tokens joined by spaces.

    With `java`, the path of a Java runtime, METEOR 1.5 (Denkowski & Lavie 2014) with `-l en -norm` over the corpus:
    words are aligned with those of the best reference by form, stem, WordNet synonym and paraphrase; the score is
    their weighted F-mean times 1 - gamma * (chunks / matches)^beta.

    Without, nltk's METEOR with the same weights, which aligns by form and stem alone, counts function words in full
    and takes the mean over outputs.

    Raises:
        LorakitError: Java failed.
        ConfigurationError: pycocoevalcap or nltk is not installed.
    """
    return _nltk(outputs, references) if java is None else _official(outputs, references, java)


def _official(outputs: Sequence[str], references: Sequence[Sequence[str]], java: str) -> float:
    most = max(map(len, references))
    # The program wants as many references for each output: the first again changes no maximum.
    filled = [[*group, *[group[0]] * (most - len(group))] for group in references]
    program = jar("meteor", "meteor-1.5.jar")
    with tempfile.TemporaryDirectory(prefix="lorakit-meteor-") as folder:
        hypotheses = _write_lines(Path(folder, "outputs"), outputs)
        answers = _write_lines(Path(folder, "references"), [text for g in filled for text in g])
        # The memory that the official scorers give it: it reads a table of paraphrases.
        printed = run_java(
            java,
            "-Xmx2G",
            "-jar",
            str(program),
            str(hypotheses),
            str(answers),
            *("-l", "en", "-norm", "-r", str(most)),
            timeout=300 + most * len(outputs) / 10,
        )
    found = re.search(r"^Final score:\s+(\S+)", printed, re.MULTILINE)
    if found is None:
        raise LorakitError(f"METEOR printed no final score, but: {printed[-500:]!r}")
    return float(found[1])


def _write_lines(path: Path, texts: Sequence[str]) -> Path:
    lines = [" ".join(text.splitlines()) + "\n" for text in texts]
    path.write_bytes("".join(lines).encode("utf-8", errors="replace"))
    return path


class _NoSynonyms:
    """Stands for WordNet, whose data nltk would have to download."""

    def synsets(self, word: str) -> list:
        return []


def _nltk(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    try:
        from nltk.translate.meteor_score import meteor_score
    except ImportError as error:
        raise missing_package(error, "metrics") from None
    scores = [
        meteor_score(
            [text.split() for text in group],
            output.split(),
            wordnet=_NoSynonyms(),  # type: ignore[arg-type]
            alpha=ALPHA,
            beta=BETA,
            gamma=GAMMA,
        )
        for output, group in zip(outputs, references, strict=True)
    ]
    return float(sum(scores)) / len(scores)
