from __future__ import annotations

import pytest

from lorakit.cli.data import DataCommandConfig
from lorakit.cli.parsing import parse
from lorakit.data import DataConfig
from lorakit.errors import ConfigurationError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "completions"}, "task is 'completions'.* Did you mean 'completion'"),
        ({"columns": {"promt": "x"}}, "unknown field 'promt'.* Did you mean 'prompt'"),
        ({"max_length": 1}, "max_length is 1; it must be .* 2 or more"),
        ({"limit": 0}, "limit is 0; it must be .* 1 or more"),
        ({"validation_fraction": 1.0}, "below 1"),
        ({"validation_fraction": float("nan")}, "must be a finite number"),
        ({"validation_fraction": 0.1, "validation": "b.jsonl"}, "not both"),
        ({"too_long": "cut"}, "too_long is 'cut'; it must be one of stop, skip, truncate"),
        ({"bad_rows": "truncate"}, "bad_rows is 'truncate'; it must be one of stop, skip"),
        ({"prompt_template": "{a.b}"}, "prompt_template"),
        ({"prompt_template": "{a}", "task": "chat"}, "task chat has no prompt"),
        (
            {"chat_template_kwargs": {"messages": []}},
            r"data\.chat_template_kwargs has 'messages', which is set",
        ),
        (
            {"chat_template_kwargs": {"enable_thinking": False}, "task": "text"},
            "task text uses no chat template; remove it, or set data.task to chat",
        ),
        ({"completion_template": "{{a}}"}, "completion_template is '{{a}}', without a column"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        DataConfig(train="a.jsonl", **settings)


def test_part_of_no_training_data_cannot_be_held_out():
    with pytest.raises(ConfigurationError, match=r"data\.train is not set"):
        DataConfig(validation_fraction=0.1)


def test_several_files_have_no_split_of_their_own():
    files = DataConfig(train=["a.jsonl", "b.jsonl"])
    assert files.source("train") == ["a.jsonl", "b.jsonl"]
    assert files.source("validation") is None


def test_docstrings_bring_their_own_splits_and_files_do_not():
    built_in = DataConfig(train="docstrings")
    assert built_in.source("validation") == built_in.source("test") == "docstrings"
    files = DataConfig(train="a.jsonl", test="b.jsonl")
    assert (files.source("validation"), files.source("test")) == (None, "b.jsonl")
    held_out = DataConfig(train="o/n", validation_fraction=0.1, train_split="all")
    assert (held_out.source("validation"), held_out.hub_split("validation")) == ("o/n", "all")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"train": "o/n", "validation_split": "dev"},
            r"data\.validation_split is 'dev', but data\.validation is not set\. .* --data\.validation o/n\.",
        ),
        (
            {"train": "a.jsonl", "train_split": "train[:9]"},
            r"data\.train_split is .*, but data\.train is 'a\.jsonl', and files have no splits",
        ),
        ({"train": "o/n", "test": ["a.csv", "b*.csv"], "test_split": "x"}, "files have no splits"),
        (
            {"task": "chat", "test_split": "x"},
            r"data\.test is not set\. .* --data\.test owner/name",
        ),
        ({"train_split": "x"}, r"data\.train is not set"),
        (
            {"train": "o/n", "validation_fraction": 0.1, "validation_split": "dev"},
            r"data\.validation_fraction takes the validation data from data\.train",
        ),
    ],
)
def test_a_split_that_no_source_has_is_refused(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        DataConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"train": ["a.jsonl", "o/n:config@main"], "train_split": "dev"},
        {"train": "docstrings", "validation_split": "test"},
        {"task": "mnli", "validation_split": "validation_matched"},
        {"validation_split": "validation_matched"},  # the task can be that of an adapter
    ],
)
def test_a_split_that_a_source_can_have_is_accepted(settings):
    assert DataConfig(**settings)


def test_the_command_line_sets_the_same_fields():
    arguments = [
        "--base.name=b",
        "--data.train=[a.jsonl, b.csv]",
        "--data.columns={prompt: question}",
        "--data.too_long=skip",
        "--data.prompt_template={prompt}",
    ]

    config = parse(DataCommandConfig, "data", "Preview.", arguments)
    assert config.data == DataConfig(
        train=["a.jsonl", "b.csv"],
        columns={"prompt": "question"},
        too_long="skip",
        prompt_template="{prompt}",
    )
