"""The public data sets of the LoRA paper, loaded by configuration."""

from __future__ import annotations

import pytest
from tiny_tokenizer import tiny_encoder_tokenizer, tiny_tokenizer

from lorakit.data import DataConfig, load_examples, preview
from lorakit.tasks import language_modelling

ROWS = 200


def load(shared, name, split="train", *, tokenizer, **settings):
    folder = shared / "data" / name
    files = {file.name.split(".")[0]: str(file) for file in folder.glob("*.jsonl*")}
    config = DataConfig(
        train=files["train"],
        validation=files["validation"],
        limit=ROWS,
        **({"max_length": 2048} | settings),
    )
    return load_examples(config, split, tokenizer)


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize(
    ("name", "columns", "labels"),
    [
        ("mrpc", {}, ("0", "1")),
        ("rte", {}, ("0", "1")),
        ("cola", {"text": "sentence"}, ("0", "1")),
        ("sst2", {"text": "sentence"}, ("0", "1")),
    ],
)
def test_classification_sets(shared, name, columns, labels, split):
    examples = load(shared, name, split, tokenizer=tiny_encoder_tokenizer(), columns=columns)
    assert (examples.task, examples.labels) == ("classification", labels)
    assert (len(examples), examples.report.skipped) == (ROWS, 0)
    assert all(str(example.label) == example.completion for example in examples)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_stsb_is_a_regression(shared, split):
    examples = load(shared, "stsb", split, tokenizer=tiny_encoder_tokenizer())
    assert (examples.task, examples.labels, len(examples)) == ("regression", (), ROWS)
    assert all(type(example.label) is float and 0 <= example.label <= 5 for example in examples)


@pytest.mark.slow
def test_e2e_has_several_references_for_one_input(shared):
    tokenizer = tiny_tokenizer()
    examples = load(
        shared,
        "e2e_nlg",
        tokenizer=tokenizer,
        columns={"prompt": "meaning_representation", "completion": "human_reference"},
        prompt_template="{prompt}\n",
    )
    first = examples[0]
    assert first.prompt.startswith("name[The Vaults], eatType[pub], priceRange[more than £30]")
    assert tokenizer.decode(first.input_ids) == f"{first.prompt}{first.completion}<|im_end|>"
    assert examples.sha256.startswith("2acbdf61666a874d")  # from the README of the data
    # Held out by input: no meaning representation is on both sides.
    settings = {
        "columns": {"prompt": "meaning_representation", "completion": "human_reference"},
        "limit": 2000,
        "validation_fraction": 0.1,
    }
    config = DataConfig(train=str(shared / "data/e2e_nlg/train.jsonl.gz"), **settings)
    train, held_out = (load_examples(config, split, tokenizer) for split in ("train", "validation"))
    assert len(train) + len(held_out) == 2000
    assert not {e.prompt for e in train} & {e.prompt for e in held_out}


@pytest.mark.slow
def test_samsum_has_one_empty_dialogue_and_repeats_of_train_in_validation(shared, monkeypatch):
    settings = {
        "prompt_template": "{dialogue}\nSummary:",
        "completion_template": " {summary}",
        "max_length": 8192,
        "bad_rows": "skip",
    }
    tokenizer = tiny_tokenizer()
    examples = load(shared, "samsum", tokenizer=tokenizer, **settings)
    assert (len(examples), examples.report.skipped) == (ROWS, 0)
    first = examples[0]
    assert tokenizer.decode(first.input_ids) == f"{first.prompt}{first.completion}<|im_end|>"

    # The counts of the whole set do not depend on the tokens, and encoding all of them takes 10 seconds.
    encode = language_modelling.encode_text
    monkeypatch.setattr(language_modelling, "encode_text", lambda t, text: encode(t, text[:2]))
    files = {
        split: str(shared / "data/samsum" / name)
        for split, name in (("train", "train.jsonl.gz"), ("validation", "validation.jsonl"))
    }
    shown = preview(DataConfig(**files, **settings), tokenizer)
    report = shown.splits["train"].report
    assert (report.read, report.kept) == (14732, 14731)
    assert str(report.bad[0]).endswith("train.jsonl.gz:6055: 'dialogue' is empty")
    assert shown.overlaps[0].prompts == 47  # from the README of the data
