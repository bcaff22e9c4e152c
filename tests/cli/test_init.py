"""`lorakit init` writes a file that every command reads."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from lorakit import storage
from lorakit.cli import main
from lorakit.cli.data import DataCommandConfig
from lorakit.cli.generate import GenerateConfig
from lorakit.cli.init import _output
from lorakit.cli.parsing import parse
from lorakit.data import DataConfig
from lorakit.data.examples import task_of
from lorakit.errors import ConfigurationError
from lorakit.models.base_config import BaseConfig
from lorakit.training.config import TrainConfig

CHAT = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
DATA: dict[str, tuple[list[dict[str, Any]], str, dict[str, str], str]] = {
    "chat": (CHAT, "chat", {}, "smollm2-135m"),
    "prompts": ([{"prompt": "a", "completion": "b"}], "completion", {}, "smollm2-135m"),
    "questions": (
        [{"id": "1", "Question": "a", "Reply": "b"}],
        "completion",
        {"prompt": "Question", "completion": "Reply"},
        "smollm2-135m",
    ),
    "labels": (
        [{"review": "good", "sentiment": "yes: pos"}, {"review": "bad", "sentiment": "neg"}],
        "classification",
        {"text": "review", "label": "sentiment"},
        "minilm-l6",
    ),
}


def write(folder: Path, rows: list[dict[str, Any]], suffix: str) -> str:
    path = folder / f"rows{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path.name


@pytest.mark.parametrize(("rows", "task", "columns", "base"), DATA.values(), ids=DATA)
def test_every_command_reads_the_file(
    rows, task, columns, base, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    data = write(tmp_path, rows, ".jsonl" if task == "chat" else ".csv")
    assert main(["init", data]) == 0
    assert "lorakit train --config run.yaml" in capsys.readouterr().out
    config = parse(TrainConfig, "train", "", ["--config", "run.yaml"])
    assert (config.data.train, config.data.task, config.data.columns) == (data, task, columns)
    assert (config.base.name, config.output) == (base, "out/rows")
    assert task_of(config.data).name == task
    assert config.lora.targets == ("all-linear",)
    assert "# The quality of full fine-tuning needs all-linear." in Path("run.yaml").read_text()
    assert parse(DataCommandConfig, "data", "", ["--config", "run.yaml"]).data == config.data
    use = parse(GenerateConfig, "generate", "", ["--config", "run.yaml", "--prompt", "x"])
    assert (use.adapter, use.output, use.method) == ("out/rows/adapter", None, None)
    assert "# labels: neg, yes: pos" in Path("run.yaml").read_text() or task != "classification"


def test_columns_of_no_task_and_a_file_that_exists(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    data = write(tmp_path, [{"left": "a", "right": "b"}], ".jsonl")
    assert main(["init", data]) == 1
    assert "has the columns left, right" in capsys.readouterr().err
    assert not Path("run.yaml").exists()
    chosen = [data, "--data.columns.prompt", "left", "--data.columns.completion", "right"]
    assert main(["init", *chosen]) == 0
    text = Path("run.yaml").read_text()
    assert "columns: {completion: right, prompt: left}" in text
    assert "validation_fraction: 0.1" in text
    capsys.readouterr()
    assert main(["init", *chosen]) == 1
    assert "Choose another file (--file FILE), or pass overwrite=True" in capsys.readouterr().err
    assert main(["init", *chosen, "--output", "other.yaml"]) == 1
    assert "Did you mean '--file'?" in capsys.readouterr().err
    assert Path("run.yaml").read_text() == text
    more = ["--base.name", "other", "--data.validation", "held.jsonl", "--data.max_length", "64"]
    assert main(["init", *chosen, "--overwrite", *more]) == 0
    capsys.readouterr()
    assert main(["init", *chosen, "--file", "my run.yaml"]) == 0
    assert "  lorakit train --config 'my run.yaml'\n" in capsys.readouterr().out
    config = parse(TrainConfig, "train", "", ["--config", "run.yaml"])
    assert (config.base.name, config.data.validation) == ("other", "held.jsonl")
    assert (config.data.max_length, config.data.validation_fraction) == (64, 0)


def test_an_option_of_the_base_keeps_the_default_name(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, [{"prompt": "a", "completion": "b"}], ".csv")
    assert main(["init", "rows.csv", "--base.dtype", "nf4"]) == 0
    base = parse(TrainConfig, "train", "", ["--config", "run.yaml"]).base
    assert (base.name, base.dtype) == ("smollm2-135m", "nf4")
    capsys.readouterr()


def test_what_is_not_read_is_said_and_given_options_stay(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"context": "c", "question": "a", "answer": "b", "input": "i"}]
    write(tmp_path, rows, ".csv")
    assert main(["init", "row*.csv", "--data.too_long", "stop"]) == 0
    assert "Columns that no field reads: context, input.\n" in capsys.readouterr().out
    text = Path("run.yaml").read_text()
    assert "  # columns that no field reads: context, input\n" in text
    assert "prompt_template: '{column}" in text
    config = parse(TrainConfig, "train", "", ["--config", "run.yaml"])
    assert (config.data.too_long, config.output) == ("stop", "out/row")
    write(tmp_path, [{"context": "c", "question": "a", "answer": "b"}], ".csv")
    template = ["--data.prompt_template", "{context} {question}", "--data.columns.completion"]
    assert main(["init", "rows.csv", "--overwrite", *template, "answer"]) == 0
    assert "no field reads" not in capsys.readouterr().out + Path("run.yaml").read_text()
    assert parse(TrainConfig, "train", "", ["--config", "run.yaml"]).data.too_long == "truncate"


def test_the_output_of_a_hub_data_set_is_a_folder_on_every_system() -> None:
    assert _output(DataConfig(train="nyu-mll/glue:mrpc")) == "out/glue-mrpc"


@pytest.mark.parametrize("end", ["\n", "\r", "\x85", "\u2028"])
def test_names_in_comments_cannot_add_settings(end, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    bad = end.join(("x", "base.name: evil/model", "base.trust_remote_code: true", "#"))
    rows = [{"text": "a", "label": bad, bad: "1"}, {"text": "b", "label": "pos", bad: "2"}]
    data = write(tmp_path, rows, ".jsonl")
    file = f"run{end}method: full{end}#.yaml"
    assert main(["init", data, "--file", file]) == 0
    assert "evil/model" in Path(file).read_text()
    assert list(storage.read_yaml(file, ConfigurationError)) == [
        *("base", "data", "output", "adapter", "method", "lora"),
        *("epochs", "batch_size", "optimizer"),
    ]
    config = parse(TrainConfig, "train", "", ["--config", file])
    assert (config.method, config.base) == ("lora", BaseConfig(name="minilm-l6"))
    assert end == "\n" or end not in capsys.readouterr().out
