from __future__ import annotations

import dataclasses
import json
import re

import pytest
from tiny_tokenizer import CHAT_TEMPLATE, tiny_encoder_tokenizer, tiny_sentencepiece, tiny_tokenizer

from lorakit.data import DataConfig, preview
from lorakit.errors import DataError

TOKENIZER = tiny_tokenizer()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pair(prompt, completion):
    return {"prompt": prompt, "completion": completion}


@pytest.fixture
def config(tmp_path):
    train = [pair("a", "1"), pair("a", "2"), pair("a", "2"), pair("bcdef ", "3"), pair("g", " ")]
    validation = [pair("a", "2"), pair("a", "9"), pair("z", "3")]
    return DataConfig(
        train=write(tmp_path / "train.jsonl", train),
        validation=write(tmp_path / "validation.jsonl", validation),
    )


def test_examples_show_tokens_and_targets(config):
    shown = preview(config, TOKENIZER, n=2)
    assert len(shown.examples) == 2
    first = shown.examples[0]
    assert [(token.text, token.target) for token in first.tokens] == [
        ("a", False),
        ("1", True),
        ("<|im_end|>", True),
    ]
    assert first.origin == f"{config.train}:1"


def test_blanks_at_the_start_of_tokens_are_shown(tmp_path):
    """Decoded alone, SentencePiece's tokens have none."""
    config = DataConfig(train=write(tmp_path / "train.jsonl", [pair("a", " b c")]))
    tokens = preview(config, tiny_sentencepiece()).examples[0].tokens
    assert "".join(token.text for token in tokens if token.target) == " b c</s>"


def test_without_training_data_the_first_split_is_shown(config):
    shown = preview(DataConfig(validation=config.validation), TOKENIZER, n=1)
    assert shown.task == "completion"
    assert list(shown.splits) == ["validation"]
    assert shown.examples[0].origin == f"{config.validation}:1"


def test_no_data_at_all_is_an_error():
    with pytest.raises(DataError, match=r"set data\.train"):
        preview(DataConfig(), TOKENIZER)


def test_tokens_that_are_part_of_a_character_show_their_name(tmp_path):
    config = DataConfig(train=write(tmp_path / "train.jsonl", [pair("é", "b")]))
    tokens = preview(config, TOKENIZER).examples[0].tokens
    assert [token.text for token in tokens[:2]] == ["Ã", "©"]


def test_lengths_and_targets_are_counted(config):
    train = preview(config, TOKENIZER).splits["train"]
    longest = len(TOKENIZER("bcdef ")["input_ids"]) + 2
    assert train.lengths.histogram[0] == (3, 3, 3)
    assert (train.lengths.p50, train.lengths.max, train.lengths.total) == (
        3,
        longest,
        3 * 3 + longest,
    )
    assert sum(count for _, _, count in train.lengths.histogram) == 4
    assert train.targets == 4 * 2


def test_duplicates_are_counted_within_and_between_splits(config):
    shown = preview(config, TOKENIZER)
    train = shown.splits["train"]
    assert (train.repeated_prompts, train.repeated_examples, train.shared_prompts) == (2, 1, 0.75)
    (overlap,) = shown.overlaps
    assert (overlap.first, overlap.second) == ("train", "validation")
    assert (overlap.prompts, overlap.examples) == (2, 1)


def test_what_would_stop_a_run_does_not_stop_the_preview(config):
    shown = preview(config, TOKENIZER)
    assert len(shown.splits["train"].report.bad) == 1
    assert any("would stop at 1 bad rows of train" in note for note in shown.notes)
    assert any("1 prompts of train end in a space" in note for note in shown.notes)


def test_notes_on_lengths_escapes_and_special_tokens(tmp_path):
    rows = [pair("a " * 40, "b"), pair("a", "b<|im_end|>c")]
    config = DataConfig(
        train=write(tmp_path / "train.jsonl", rows), max_length=16, prompt_template=r"{prompt}\n"
    )
    notes = "\n".join(preview(config, TOKENIZER).notes)
    assert "would stop at 1 rows of train above max_length 16" in notes
    assert "prompt_template contains a backslash and an n" in notes
    assert "1 examples of train have <|im_end|> inside a text with loss" in notes


def turns(*contents: str) -> dict:
    roles = ("user", "assistant") * len(contents)
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return {"messages": messages}


@pytest.mark.parametrize(
    ("row", "noted"),
    [
        ({"text": "old <|im_end|> price <|im_start|> here"}, {"<|im_end|>", "<|im_start|>"}),
        ({"text": "old price here"}, set()),
        (turns("q", "a <|im_end|> b", "q", "plain"), {"<|im_end|>"}),
        (turns("q", "plain", "q", "a <|im_start|> b"), {"<|im_start|>"}),
        (turns("q <|im_end|>", "a", "q", "plain"), set()),
        (pair("q <|im_end|>", "plain"), set()),
    ],
)
def test_special_tokens_inside_targets_are_noted(tmp_path, row, noted):
    config = DataConfig(train=write(tmp_path / "train.jsonl", [row]))
    notes = preview(config, TOKENIZER).notes
    assert {re.sub(".* have (.*) inside .*", r"\1", note) for note in notes} == noted


def test_special_tokens_of_the_chat_template_are_not_noted(tmp_path):
    template = CHAT_TEMPLATE.replace("+ message['content']", "+ '<|channel|>' + message['content']")
    tokenizer = tiny_tokenizer(chat_template=template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|channel|>"]})
    train = write(tmp_path / "train.jsonl", [turns("q", "a", "q", "plain")])
    shown = preview(DataConfig(train=train), tokenizer)
    assert "<|channel|>" in [token.text for token in shown.examples[0].tokens if token.target]
    assert shown.notes == []


@pytest.mark.parametrize(("template", "notes"), [("Answer:", 1), ("{prompt}:", 0)])
def test_a_prompt_template_without_a_column_is_noted(config, template, notes):
    config = dataclasses.replace(config, prompt_template=template)
    shown = preview(config, TOKENIZER).notes
    assert sum("prompt_template contains no column" in note for note in shown) == notes


def test_labels_and_scores_are_counted(tmp_path):
    rows = [{"text": "a", "label": label} for label in ("x", "y", "x")]
    path = write(tmp_path / "train.jsonl", rows)
    classes = preview(DataConfig(train=path), tiny_encoder_tokenizer())
    assert classes.splits["train"].labels == {"x": 2, "y": 1}
    assert classes.splits["train"].targets is None
    assert classes.examples[1].label == 1
    assert not any(token.target for token in classes.examples[0].tokens)

    rows = [{"text": "a", "score": score} for score in (1, 2.5, 2.5)]
    path = write(tmp_path / "train.jsonl", rows)
    scores = preview(DataConfig(train=path), tiny_encoder_tokenizer())
    assert scores.splits["train"].scores == (1.0, 2.0, 2.5)
    assert scores.splits["train"].labels == {}


def test_the_preview_is_plain_data(config):
    shown = preview(config, TOKENIZER).to_dict()
    assert json.loads(json.dumps(shown))["splits"]["train"]["report"]["read"] == 5
    assert shown["overlaps"][0]["prompts"] == 2
