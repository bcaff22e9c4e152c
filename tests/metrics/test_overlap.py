"""BLEU and ROUGE by sacrebleu and rouge_score."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest

from lorakit.errors import ConfigurationError, DataError
from lorakit.metrics import bleu, rouge
from lorakit.metrics.overlap import text_scores


def test_rouge_by_hand() -> None:
    # "a b c d" and "a b d e" share 3 of 4 words, 1 of 3 word pairs, and "a b d" of 4 words.
    assert rouge(["a b c d"], [["a b d e"]]) == {
        "ROUGE_1": pytest.approx(3 / 4),
        "ROUGE_2": pytest.approx(1 / 3),
        "ROUGE_L": pytest.approx(3 / 4),
    }


def test_rouge_takes_the_best_reference_of_each_score_and_the_mean_over_outputs() -> None:
    scores = rouge(["a b c", "x"], [["c b a", "a b q"], ["y"]])
    assert scores["ROUGE_1"] == pytest.approx((1 + 0) / 2)  # the first reference
    assert scores["ROUGE_2"] == pytest.approx((1 / 2 + 0) / 2)  # the second
    assert scores["ROUGE_L"] == pytest.approx((2 / 3 + 0) / 2)


def test_rouge_compares_stems_by_default() -> None:
    assert rouge(["dogs running"], [["dog runs"]])["ROUGE_1"] == pytest.approx(1)
    assert rouge(["dogs running"], [["dog runs"]], stem=False)["ROUGE_1"] == 0


def test_texts_without_words_score_zero() -> None:
    assert rouge(["", "?"], [["a"], [""]]) == {"ROUGE_1": 0, "ROUGE_2": 0, "ROUGE_L": 0}
    assert bleu([""], [["a"]]) == 0


def test_bleu_smoothing() -> None:
    outputs, references = ["a b c x e f"], [["a b c d e f"]]
    assert bleu(outputs, references, smoothing="none") == 0  # no four words in a row match
    assert bleu(outputs, references) > 0


def test_bleu_of_tokenized_texts_is_silent(caplog) -> None:
    with caplog.at_level(logging.WARNING):
        bleu(["a b c d ."] * 200, [["a b c d ."]] * 200)
    assert not caplog.records


@pytest.mark.parametrize("metric", [bleu, rouge])
def test_no_reference_is_an_error(metric) -> None:
    with pytest.raises(DataError, match="Output 1 has no reference"):
        metric(["a"], [[]])


@pytest.mark.parametrize(
    ("metric", "module"),
    [
        (bleu, "sacrebleu.metrics.bleu"),
        (rouge, "rouge_score.rouge_scorer"),
        (text_scores, "sacrebleu.metrics.bleu"),
    ],
)
def test_a_missing_package_names_the_extra(monkeypatch, metric, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigurationError, match=r'pip install "lorakit\[train\]"'):
        metric(["a"], [["a"]])


def test_bleu_equals_the_official_e2e_scorer(shared: Path) -> None:
    folder = shared / "metrics" / "e2e_golden"
    outputs = (folder / "outputs.txt").read_text(encoding="utf-8").splitlines()
    groups = (folder / "references.txt").read_text(encoding="utf-8").strip().split("\n\n")
    golden = json.loads((folder / "scores.json").read_text())
    scores = text_scores(outputs, [group.splitlines() for group in groups])
    assert round(scores["bleu"] / 100, 4) == golden["BLEU"]
    # The official ROUGE-L weighs recall by 1.2 and takes precision and recall from different references.
    assert scores["rouge_l"] / 100 == pytest.approx(golden["ROUGE_L"], abs=0.005)
    groups_of_lines = [group.splitlines() for group in groups]
    assert scores["rouge_l"] == 100 * rouge(outputs, groups_of_lines, stem=False)["ROUGE_L"]


@pytest.mark.parametrize(
    ("text", "other", "shared"),
    [
        ("Привет, мир: как дела?", "привет мир: как она", 3 / 4),
        ("σκύλος τρέχει γρήγορα", "σκύλος τρέχει", 4 / 5),
        ("नमस्ते दुनिया", "नमस्ते", 2 / 3),  # its vowel signs are combining marks
        ("naïve Größe", "naive größe", 1 / 2),
        ("我们去公园。", "我们去", 6 / 8),  # a character is a word
        ("カレー々", "カレ", 4 / 6),
        ("สวัสดี", "สวัส", 8 / 10),
    ],
)
def test_rouge_l_compares_the_words_of_every_script(text, other, shared) -> None:
    assert text_scores([text], [[text]])["rouge_l"] == pytest.approx(100)
    assert text_scores([text], [[other]])["rouge_l"] == pytest.approx(100 * shared)


@pytest.mark.parametrize("texts", [["yes", "no"], ["New York", "42 km"], ["+", "-"], ["👍", ":-)"]])
def test_short_answers_that_are_right_have_the_full_score(texts) -> None:
    groups = [[text] for text in texts]
    assert text_scores(texts, groups) == pytest.approx({"bleu": 100, "rouge_l": 100})
    assert text_scores(texts, groups[::-1]) == {"bleu": 0, "rouge_l": 0}
    assert bleu(["yes"], [["yes"]]) == 0  # sacrebleu's default


def test_one_output_of_four_tokens_makes_bleu_that_of_sacrebleu() -> None:
    outputs, groups = ["yes", "a b c d e"], [["yes"], ["a b c d f"]]
    assert text_scores(outputs, groups)["bleu"] == bleu(outputs, groups) > 0


def test_rouge_of_samsum_rejects_references_in_another_script() -> None:
    with pytest.raises(
        DataError, match=r"No reference has a word of a-z or 0-9.*'привет'.*data\.task"
    ):
        rouge(["привет"], [["", "привет"]])
    assert rouge(["привет"], [["привет", "hello"]])["ROUGE_L"] == 0


def test_outputs_may_have_different_numbers_of_references() -> None:
    outputs = ["the cat sat on the mat", "a dog ran home today"]
    references = [["the cat sat on the mat", "a cat sat there"], ["a dog ran home today"]]
    assert text_scores(outputs, references) == {
        "bleu": pytest.approx(100),
        "rouge_l": pytest.approx(100),
    }


def test_case_matters_when_asked() -> None:
    outputs, references = ["The Cat sat on the mat"], [["the cat sat on the mat"]]
    assert text_scores(outputs, references)["bleu"] == pytest.approx(100)
    assert text_scores(outputs, references, lowercase=False)["bleu"] < 80


def test_rouge_l_takes_the_best_reference() -> None:
    # Longest common subsequence "a b c": precision 3/3, recall 3/4.
    scores = text_scores(["a b c"], [["x y z", "a q b c"]])
    assert scores["rouge_l"] == pytest.approx(100 * 2 * 1 * 0.75 / 1.75)


@pytest.mark.parametrize(
    ("outputs", "references", "message"),
    [
        ([], [], "list of outputs is empty"),
        (["a"], [["b"], ["c"]], "Found 1 outputs and 2 references"),
        (["a", "b"], [["a"], []], "Output 2 has no reference"),
    ],
)
def test_invalid_inputs_are_reported(outputs, references, message: str) -> None:
    with pytest.raises(DataError, match=message):
        text_scores(outputs, references)
