"""`lorakit score`: output and error messages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lorakit.cli import main
from lorakit.formatting import number
from lorakit.metrics import rouge


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    outputs, references = tmp_path / "outputs.txt", tmp_path / "references.txt"
    outputs.write_text("a cat sat\na dog\n")
    references.write_text("the cat sat\n\na dog\ndogs\n")
    return str(outputs), str(references)


def test_prints_a_table(capsys, files) -> None:
    assert main(["score", *files, "--metrics", "rouge"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    scores = rouge(["a cat sat", "a dog"], [["the cat sat"], ["a dog", "dogs"]])
    assert lines == [
        ["score", "value"],
        *([name, number(value)] for name, value in scores.items()),
    ]


def test_names_scores_without_java(capsys, files) -> None:
    assert main(["score", *files, "--metrics", "e2e", "--java", "false", "--json", "true"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert list(scores) == [
        "BLEU",
        "NIST",
        "METEOR (without Java)",
        "ROUGE_L (without Java)",
        "CIDEr (without Java)",
    ]


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["--metrics", "rouge"], 1, "outputs"),
        (["a.txt", "b.txt"], 1, "metrics"),
        (["a.txt", "b.txt", "--metric", "rouge"], 1, "Did you mean '--metrics'?"),
        (["a.txt", "b.txt", "--metrics", "blue"], 1, "one of e2e, webnlg"),
        (["nothing.txt", "b.txt", "--metrics", "rouge"], 1, "'nothing.txt' does not exist. Check"),
    ],
)
def test_errors_say_what_to_write(capsys, argv, status: int, message: str) -> None:
    assert main(["score", *argv]) == status
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_scorers_are_imported_when_first_used() -> None:
    code = (
        "import sys, lorakit, lorakit.cli.score; lorakit.metrics.e2e;"
        "print([m for m in ('nltk', 'sklearn', 'scipy', 'sacrebleu', 'rouge_score', 'pycocoevalcap', 'rapidfuzz')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
