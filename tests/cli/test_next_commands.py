"""The commands that `lorakit init` and `lorakit train` print: they run as printed, and merging needs a folder."""

from __future__ import annotations

import io
import shlex
import sys
from pathlib import Path

import pytest
import tiny_runs

from lorakit.cli import main
from lorakit.cli.next_commands import commands_for

CHATS = [
    {
        "messages": [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
    }
    for row in tiny_runs.pairs(8)
]
LONG = {"max_position_embeddings": 256}
KINDS = {
    "chat": (CHATS, ("llama", None, LONG)),
    "classification": (tiny_runs.labelled(8), ("bert", "base", {})),
}
FITTING = {
    "chat": {"generate", "chat", "serve", "merge"},
    "completion": {"generate", "serve", "merge"},
    "text": {"generate", "serve", "merge"},
    "classification": {"predict", "serve", "merge"},
    "regression": {"predict", "serve", "merge"},
}


@pytest.mark.parametrize("task", FITTING)
def test_the_commands_fit_the_task_and_the_method(task: str) -> None:
    cases = {
        ("lora",): set(),
        ("full",): {"serve"},
        ("lora", "prefix_layer"): {"serve", "merge"},
        ("own_method.py:IA3",): {"serve", "merge"},
    }
    for methods, without in cases.items():
        commands = commands_for(task, "--adapter a", "out/a b", methods)
        assert {line.split()[1] for line in commands} == FITTING[task] - without
        outputs = [shlex.split(line)[-1] for line in commands if "--output" in line]
        assert all(output.startswith("out/a b-") for output in outputs)
        quoted = [line.rpartition(" --output ")[2] for line in commands if "--output" in line]
        assert all(output.startswith("'out/a b-") and output[-1] == "'" for output in quoted)


def test_merging_with_the_file_of_a_run_names_an_output(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_runs.write_rows(tmp_path / "rows.jsonl", tiny_runs.pairs(2))
    assert main(["init", "rows.jsonl"]) == 0
    capsys.readouterr()
    for words in (["merge"], ["merge", "out/rows/adapter"]):
        assert main([*words, "--config", "run.yaml"]) == 1
        message = capsys.readouterr().err
        assert "The output in run.yaml, out/rows, is the folder of the run" in message
        assert "for example --output out/rows-merged." in message
    assert main(["merge", "out/rows/adapter"]) == 1
    assert "output is not set. Add --output VALUE" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("task", KINDS)
def test_the_printed_commands_run(task: str, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    rows, (arch, head, settings) = KINDS[task]
    tiny_runs.save_base(tmp_path / "base", arch, head, **settings)
    tiny_runs.write_rows(tmp_path / "rows.jsonl", rows)
    Path("NEW.csv").write_text("text\nriver\n")

    def printed(words: list[str]) -> list[str]:
        """Run a command and return those that it prints."""
        monkeypatch.setattr(sys, "stdin", io.StringIO("river\n"))
        assert main(words) == 0
        out = capsys.readouterr().out
        return [
            f"lorakit {line.split('lorakit ', 1)[1]}"
            for line in out.splitlines()
            if "  lorakit " in line
        ]

    server = "lorakit serve --follow out/rows --open"  # runs until a signal
    commands = printed(["init", "rows.jsonl", "--base.name", "base"])
    after = [new for line in commands if line != server for new in printed(shlex.split(line)[1:])]
    assert {line.split()[1] for line in commands} == {
        "data",
        "plan",
        "train",
        "evaluate",
    } | FITTING[task]
    assert {line.split()[1] for line in after} == {"inspect"} | FITTING[task]
    for line in after:
        overwrite = ["--overwrite"] if "--output" in line else []
        if line != server:
            printed([*shlex.split(line)[1:], *overwrite])


@pytest.mark.slow
def test_training_further_names_commands_for_the_adapter_s_method(tmp_path, capsys) -> None:
    base = tiny_runs.save_base(tmp_path / "base")
    data = tiny_runs.write_rows(tmp_path / "rows.jsonl", tiny_runs.pairs(8))
    words = ["train", "--base.name", base, "--data.train", data, "--max_steps", "1"]
    first, second = tmp_path / "first", tmp_path / "second"
    assert main([*words, "--method", "full", "--output", str(first)]) == 0
    further = ["--from_adapter", str(first / "adapter"), "--output", str(second)]
    assert main([*words, *further]) == 0
    out = capsys.readouterr().out
    assert f"lorakit serve --follow {second}" not in out
    assert f"lorakit merge --adapter {second / 'adapter'}" in out
