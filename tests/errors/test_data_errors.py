"""Data that is empty, has wrong columns, or is too long."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_runs import save_base, write_rows
from user_mistakes import (
    CONTEXT,
    ROWS,
    Shell,
    nothing_left,
    on_data,
    refused,
)

import lorakit
from lorakit.cli import main
from lorakit.errors import DataError
from lorakit.evaluation.decoding import Decoding
from lorakit.evaluation.generate import generate

# --- data -----------------------------------------------------------------------------------------

EMPTY = {
    "empty.jsonl": b"",
    "blank.jsonl": b"\n \n\n",
    "list.json": b"[]",
    "empty.json": b"",
    "empty.csv": b"",
    "header.csv": b"prompt,completion\n",
}


@pytest.mark.parametrize("name", EMPTY)
@pytest.mark.parametrize("command", ["train", "data"])
def test_empty_data_file(command: str, name: str, shell: Shell, base: str) -> None:
    Path(name).write_bytes(EMPTY[name])
    shell.refuses(on_data(command, base) + name, name, "empty", "no rows")


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_empty_validation_file(command: str, shell: Shell, base: str, data: str) -> None:
    Path("held-out.jsonl").touch()
    line = on_data(command, base) + f"{data} --data.validation held-out.jsonl"
    shell.refuses(line, "held-out.jsonl", "empty")


COLUMNS = {
    "of no task": ({"question": "a", "answer": "b"}, "", ["question, answer", "columns"]),
    "half a task": ({"prompt": "a", "answer": "b"}, "", ["prompt, answer", "prompt + completion"]),
    "of another task": (
        {"text": "a", "label": "b"},
        "--data.task chat",
        ["text, label", "messages"],
    ),
    "mapped": (
        {"question": "a", "answer": "b"},
        '--data.columns {"prompt":"qestion","completion":"answer"}',
        ["qestion", "Did you mean 'question'?"],
    ),
    "in a template": (
        {"question": "a", "answer": "b"},
        "--data.prompt_template {qestion} --data.completion_template {answer}",
        ["qestion", "question"],
    ),
}


@pytest.mark.parametrize(("row", "options", "words"), COLUMNS.values(), ids=COLUMNS)
@pytest.mark.parametrize("command", ["train", "data"])
def test_data_column_missing(
    command: str, row: dict[str, str], options: str, words: list[str], shell: Shell, base: str
) -> None:
    write_rows(Path("rows.jsonl"), [row] * 3)
    shell.refuses(f"{on_data(command, base)}rows.jsonl {options}", "rows.jsonl", *words)


def test_data_column_missing_in_one_row(shell: Shell, base: str) -> None:
    write_rows(Path("rows.jsonl"), [*ROWS, {"prompt": "river"}])
    shell.refuses(on_data("train", base) + "rows.jsonl", "rows.jsonl:9", "completion", "bad_rows")


def test_data_column_missing_in_the_validation_file(shell: Shell, base: str, data: str) -> None:
    write_rows(Path("held-out.jsonl"), [{"prompt": "a", "answer": "b"}])
    line = on_data("train", base) + f"{data} --data.validation held-out.jsonl"
    shell.refuses(line, "held-out.jsonl", "answer", "completion")


def test_data_file_missing_and_the_empty_folder_of_the_user_stays_empty(
    shell: Shell, base: str, data: str
) -> None:
    Path("run").mkdir()
    shell.refuses(on_data("train", base) + "trian.jsonl", "trian.jsonl", "'train.jsonl'?")


@pytest.mark.slow
def test_data_file_missing_and_the_finished_run_stays(shell: Shell, base: str, data: str) -> None:
    """Also with --overwrite true."""
    assert main((on_data("train", base) + data).split()) == 0
    line = on_data("train", base) + "trian.jsonl --overwrite true"
    shell.refuses(line, "trian.jsonl", "Did you mean 'train.jsonl'?")


# --- longer than the context ----------------------------------------------------------------------

LONG = "river " * CONTEXT
"""Three tokens per word."""
ARCHITECTURES = ["base", "learned-positions"]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_prompt_longer_than_the_context(arch: str, shell: Shell, bases: Path) -> None:
    opened = lorakit.load_base(bases / arch, dtype="float32")
    assert opened.tokenizer is not None
    words = ["Prompt 2", f"context of {CONTEXT}", "max_new_tokens", "Shorten"]
    with nothing_left(shell.folder, opened.model), refused(DataError, *words):
        generate(opened.model, opened.tokenizer, ["river", LONG], Decoding(max_new_tokens=2))
    Path("prompts.txt").write_text(f"river\n{LONG}\n")
    shell.refuses(
        f"generate --base.name {bases / arch} --file prompts.txt --output out.jsonl"
        " --decoding.max_new_tokens 2",
        *words,
    )


def test_output_that_would_leave_the_context(shell: Shell, base: str) -> None:
    shell.refuses(
        f"generate --base.name {base} --prompt river --decoding.max_new_tokens {CONTEXT}",
        f"context of {CONTEXT}",
        "lower max_new_tokens",
    )


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_example_longer_than_max_length(command: str, shell: Shell, base: str, data: str) -> None:
    long = write_rows(Path("long.jsonl"), [*ROWS, {"prompt": LONG, "completion": " pub"}])
    line = f"{on_data(command, base)}{data} --data.validation {long} --data.max_length 32"
    shell.refuses(line, "long.jsonl:9", "max_length 32", "too_long", "truncate")


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    ("command", "split"),
    [("train", "train"), ("train", "validation"), ("evaluate", "validation")],
)
def test_example_longer_than_the_context(
    command: str, split: str, arch: str, shell: Shell, bases: Path, data: str
) -> None:
    """The user sets `max_length` above the context length of the model."""
    long = write_rows(Path("long.jsonl"), [*ROWS, {"prompt": LONG, "completion": " pub"}])
    train, validation = (long, data) if split == "train" else (data, long)
    line = f"{on_data(command, str(bases / arch))}{train} --data.validation {validation}"
    if command == "evaluate":
        line += " --scores [loss]"
    shell.refuses(f"{line} --data.max_length 1000", "long.jsonl:9", "max_length", f"{CONTEXT}")


@pytest.mark.parametrize("side", ["prompt", "completion"])
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_side_longer_than_the_context(
    command: str, side: str, shell: Shell, data: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """An encoder-decoder with learned positions limits prompt and completion separately."""
    base = save_base(tmp_path_factory.mktemp("bart"), "bart")
    row = {"prompt": "river", "completion": " pub", side: LONG}
    long = write_rows(Path("long.jsonl"), [*ROWS, row])
    line = f"{on_data(command, str(base))}{data} --data.validation {long} --data.max_length 1000"
    shell.refuses(
        line,
        "long.jsonl:9",
        f"{side} tokens",
        "the encoder and the decoder of",
        "data.max_length to",
    )


def test_a_prompt_longer_than_an_encoder_s_context(
    shell: Shell, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = save_base(tmp_path_factory.mktemp("bart"), "bart")
    Path("prompts.txt").write_text(LONG)
    shell.refuses(f"generate --base.name {base} --file prompts.txt", "Prompt 1", "Shorten")
