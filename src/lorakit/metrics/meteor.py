"""METEOR 1.5 by its authors' Java program, and an approximation by nltk."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lorakit.errors import LorakitError
from lorakit.metrics.checks import requires_extra
from lorakit.metrics.java import jar, run_java

ALPHA, BETA, GAMMA = 0.85, 0.20, 0.60
"""Parameters of METEOR 1.5 for English: weight of recall in the F-mean; exponent and weight of the order penalty."""


def meteor(outputs: Sequence[str], references: Sequence[Sequence[str]], java: str | None) -> float:
    """Return METEOR, from 0 to 1, of tokens joined by spaces.

    With `java`, the path of a Java runtime, run METEOR 1.5 (Denkowski & Lavie 2014) with `-l en -norm` over the corpus.
    It aligns words with those of the best reference by form, stem, WordNet synonym and paraphrase. The score is the
    weighted F-mean times 1 - gamma * (chunks / matches)^beta.

    Without `java`, use nltk's METEOR with the same parameters. It aligns by form and stem only, gives function words
    full weight and averages over outputs.

    Raises:
        LorakitError: Java failed.
        ConfigurationError: pycocoevalcap or nltk is not installed.
    """
    return _nltk(outputs, references) if java is None else _official(outputs, references, java)


def _official(outputs: Sequence[str], references: Sequence[Sequence[str]], java: str) -> float:
    count = max(map(len, references))
    # The program needs equally many references per output. Repeating the first does not change the maximum.
    padded = [[*group, *[group[0]] * (count - len(group))] for group in references]
    program = jar("meteor", "meteor-1.5.jar")
    with tempfile.TemporaryDirectory(prefix="lorakit-meteor-") as folder:
        hypotheses = _write_lines(Path(folder, "outputs"), outputs)
        answers = _write_lines(
            Path(folder, "references"), [text for group in padded for text in group]
        )
        # 2 GB, as in the official scorers: the program loads a table of paraphrases.
        printed = run_java(
            java,
            "-Xmx2G",
            "-jar",
            str(program),
            str(hypotheses),
            str(answers),
            *("-l", "en", "-norm", "-r", str(count)),
            timeout=300 + count * len(outputs) / 10,
        )
    score = re.search(r"^Final score:\s+(\S+)", printed, re.MULTILINE)
    if score is None:
        raise LorakitError(
            f"METEOR printed {printed[-500:]!r}, expected a final score. Score without Java: java=False."
        )
    return float(score[1])


def _write_lines(path: Path, texts: Sequence[str]) -> Path:
    lines = [" ".join(text.splitlines()) + "\n" for text in texts]
    path.write_bytes("".join(lines).encode("utf-8", errors="replace"))
    return path


class _NoSynonyms:
    """Replacement for WordNet, whose data nltk would download."""

    def synsets(self, word: str) -> list:
        return []


def _nltk(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    with requires_extra("metrics"):
        from nltk.translate.meteor_score import meteor_score
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
