"""`lorakit evaluate`: which data it scores, and what it says without data."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_runs

import lorakit
from lorakit.cli import main


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The working folder, with a base, an adapter and a data file."""
    monkeypatch.chdir(tmp_path)
    tiny_runs.save_base(tmp_path / "base")
    handle = lorakit.attach(lorakit.load_base("base", dtype="float32").model, lorakit.LoRA(rank=1))
    handle.save("adapter", provenance={"task": "completion", "labels": []})
    tiny_runs.write_rows(tmp_path / "rows.jsonl", tiny_runs.pairs(20))
    return tmp_path


def test_without_data_the_message_names_the_options(folder, capsys) -> None:
    for words in (["--adapter", "adapter"], ["--base.name", "nowhere"]):
        assert main(["evaluate", *words]) == 1
        message = capsys.readouterr().err
        assert "There is no data to score. Name a file, --data.test FILE" in message
        assert "--data.validation_fraction 0.1" in message


def test_validation_data_are_scored_if_there_are_no_test_data(folder, capsys) -> None:
    words = ["evaluate", "--adapter", "adapter", "--scores", "loss", "--compare", "false"]
    words += ["--data.train", "rows.jsonl", "--output", "out.jsonl"]
    held_out = ["--data.validation_fraction", "0.2"]
    assert main([*words, *held_out]) == 0
    unset = capsys.readouterr().out
    assert "outputs  out.jsonl (empty: the loss needs no generated text)\n" in unset
    assert "examples of the training data held out by validation_fraction 0.2" in unset
    assert (
        "rows.jsonl (training data held out by validation_fraction 0.2, "
        in Path("out.html").read_text()
    )
    words += ["--overwrite"]
    assert main([*words, *held_out, "--split", "validation"]) == 0
    assert capsys.readouterr().out == unset
    assert main([*words, *held_out, "--data.test", "rows.jsonl"]) == 0
    assert "on 20 examples of the test data" in capsys.readouterr().out


def test_missing_data_are_found_before_the_base_is_loaded(folder, capsys) -> None:
    words = ["evaluate", "--base.name", "nowhere", "--data.train", "rows.jsonl"]
    assert main([*words, "--data.test", "gone.jsonl"]) == 1
    assert "gone.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "--base.name", "nowhere"],
        ["predict", "--adapter", "nowhere", "--output", "answers.jsonl"],
    ],
)
def test_a_template_with_an_escaped_line_feed_is_said(folder, capsys, words) -> None:
    template = ["--data.prompt_template", r"Q:\n{prompt}"]
    assert main([*words, "--data.test", "gone.jsonl", *template]) == 1
    assert capsys.readouterr().err.count("prompt_template contains a backslash and an n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["init"], "data.train is not set. Name your data: lorakit init DATA."),
        (["predict", "--adapter", "a", "--output", "o.jsonl"], "for example --data.test new.csv"),
    ],
)
def test_other_commands_without_data(words, message, capsys) -> None:
    assert main(words) == 1
    assert message in capsys.readouterr().err
