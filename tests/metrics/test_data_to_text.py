"""The e2e and webnlg metrics against the official scores, with and without Java."""

from __future__ import annotations

import pyter
import pytest
from nltk.tokenize import word_tokenize

from lorakit.errors import ConfigurationError, DataError
from lorakit.metrics import WITHOUT_JAVA, e2e, webnlg
from lorakit.metrics.data_to_text import _spaced


@pytest.mark.slow
def test_golden_scores_with_java_to_four_decimals(golden, java: str) -> None:
    scores = e2e(golden.outputs, golden.references, java=True)
    assert {name: round(score, 4) for name, score in scores.items()} == golden.scores


@pytest.mark.slow
def test_golden_scores_without_java(golden) -> None:
    scores = e2e(golden.outputs, golden.references, java=False)
    java = {"METEOR", "ROUGE_L", "CIDEr"}
    assert set(scores) == {"BLEU", "NIST", *(name + WITHOUT_JAVA for name in java)}
    # The tokens are the same on these texts; METEOR lacks synonyms and paraphrases (docs/guides/metrics.md).
    for name in ("ROUGE_L", "CIDEr"):
        assert round(scores[name + WITHOUT_JAVA], 4) == golden.scores[name]
    assert 0.015 < golden.scores["METEOR"] - scores[f"METEOR{WITHOUT_JAVA}"] < 0.03


def test_java_is_used_where_it_is_installed(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert f"METEOR{WITHOUT_JAVA}" in e2e(["a cat"], [["a cat"]])
    with pytest.raises(ConfigurationError, match="default-jre-headless"):
        e2e(["a cat"], [["a cat"]], java=True)


def test_webnlg_of_equal_texts() -> None:
    text = "Alan Bean's crew flew on Apollo 12 (in 1969)."
    scores = webnlg([text], [["Quite another text.", text.upper()]], java=False)
    assert scores["BLEU"] == pytest.approx(100)
    assert scores["TER"] == 0


@pytest.mark.slow
def test_webnlg_with_java_keeps_empty_outputs_and_references_in_line(java: str) -> None:
    # If the first output lost its line, "a cat" would be compared with the fish and score below 0.2.
    scores = webnlg(["", "a cat"], [["the dog"], ["a fish", "a cat"]], java=True)
    assert 0.4 < scores["METEOR"] < 1


def test_webnlg_by_the_parts_of_the_official_scorer() -> None:
    outputs = ["Alan Bean was born in Wheeler, Texas.", "The airport's runway is 2,776.0 m long"]
    references = [
        ["Alan Bean (born in Wheeler, Texas)...", "Born in Wheeler, Alan Bean was."],
        ["The runway of the airport is 2776 metres in length."],
    ]
    scores = webnlg(outputs, references, java=False)
    rates = [
        min(pyter.ter(_words(output), _words(reference)) for reference in group)
        for output, group in zip(outputs, references, strict=True)
    ]
    assert scores["TER"] == pytest.approx(sum(rates) / 2)
    assert 0 < scores["BLEU"] < 100
    assert 0 < scores[f"METEOR{WITHOUT_JAVA}"] < 1


def test_webnlg_splits_as_the_papers_code() -> None:
    assert _spaced("  Bean's 2,776.0 m (A_b)\n") == "bean ' s 2 , 776 . 0 m ( a_b )"


def test_webnlg_uses_six_references() -> None:
    output = "a b c d e"
    sixth = webnlg([output], [["x"] * 5 + [output]], java=False)
    seventh = webnlg([output], [["x"] * 6 + [output]], java=False)
    assert sixth["TER"] == 0
    assert seventh["TER"] == 5


def test_bleu_without_any_match_is_zero_for_webnlg() -> None:
    assert webnlg(["a b c d e"], [["a b x d e"]], java=False)["BLEU"] == 0


@pytest.mark.parametrize("family", [e2e, webnlg])
@pytest.mark.parametrize(
    ("outputs", "references", "message"),
    [
        ([], [], "list of outputs is empty"),
        (["a"], [["b"], ["c"]], "Found 1 outputs and 2 references"),
        (["a", "b"], [["a"], []], "Output 2 has no reference"),
        (["a"], ["b"], r"The references of output 1 are one text.*write \[reference\]"),
        (["a"], [None], "The references of output 1 are None"),
        ([None], [["b"]], "Output 1 is None, expected text"),
        (["a"], [["b", 3]], "A reference of output 1 is 3"),
        ("a", [["b"]], "The outputs are 'a', expected a list"),
        (["a"], None, "The references are None, expected a list"),
        ((text for text in "ab"), [["b"]], "expected a list"),
    ],
)
def test_invalid_inputs_are_reported(family, outputs, references, message: str) -> None:
    with pytest.raises(DataError, match=message):
        family(outputs, references)


def test_texts_without_words_have_scores() -> None:
    assert e2e(["", "..."], [["a"], ["", "b c"]], java=False)["ROUGE_L" + WITHOUT_JAVA] == 0.5
    assert webnlg(["", "."], [["a"], ["."]], java=False)["TER"] == 0.5


def _words(text: str) -> list[str]:
    return word_tokenize(_spaced(text), preserve_line=True)
