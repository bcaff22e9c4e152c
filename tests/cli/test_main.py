"""The command line: help, misspelt names, exit statuses."""

import dataclasses
import re
import subprocess
import sys
from importlib import import_module

import pytest

from lorakit.cli import COMMANDS, main
from lorakit.cli.options import options_of
from lorakit.methods.registry import SECTIONS
from lorakit.training.config import TrainConfig


def test_overview_names_every_command(call):
    status, out, _ = call()
    assert status == 0
    for command in COMMANDS:
        assert f"\n  {command} " in out


def test_a_misspelt_command_is_corrected(call):
    for words in (["trian"], ["help", "trian"]):
        status, _, err = call(*words)
        assert status == 2
        assert "Did you mean 'train'?" in err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_a_text_for_each_option(capsys, command):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    out = capsys.readouterr().out
    assert exit_.value.code == 0
    assert out.startswith(f"usage: lorakit {command}")
    configs = import_module(f"lorakit.cli.{command}").CONFIGS
    for option in (option for config in configs for option in options_of(config).values()):
        assert len(option.text.split()) > 1, option.name
    if len(configs) == 1:  # `lorakit analyze` has one for each measure
        with pytest.raises(SystemExit):
            main([command, "--help", "all"])
        printed = " ".join(capsys.readouterr().out.split())
        for name, option in options_of(configs[0]).items():
            assert f" --{name} {' '.join(option.text.split()[:4])}" in printed


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "--lora.rnk", "4"], "Did you mean '--lora.rank'?"),
        (
            [
                "train",
                "--base.name",
                "b",
                "--data.train",
                "x.jsonl",
                "--output",
                "o",
                "--lora.rank",
                "0",
            ],
            "rank is 0",
        ),
        (["inspect"], "adapter"),
        (["generate", "--base.name", "smollm2-135m"], "--prompt"),
        (["demo", "--max_steps", "0"], "max_steps is 0"),
    ],
    ids=["misspelt option", "rank 0", "missing argument", "no prompt", "no steps"],
)
def test_a_wrong_call_is_one_clear_message(call, argv, message):
    status, out, err = call(*argv)
    assert status == 1
    assert not out
    assert message in err
    assert "Traceback" not in err


def test_ctrl_c_during_the_imports(call, monkeypatch):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr("lorakit.cli.import_module", interrupted)
    assert call("train") == (130, "", "\nlorakit train: interrupted.\n")


def test_the_option_that_no_yaml_file_can_set(call, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("recipe: roberta-base/mrpc/lora\n")
    status, _, err = call("train", "--config", str(config), "--output", str(tmp_path))
    assert (status, "--recipe works only on the command line" in err) == (1, True)
    assert "A YAML file can set every option except --recipe" in call("--help")[1]


def test_the_module_is_an_entry_point():
    version = subprocess.run(
        [sys.executable, "-m", "lorakit", "--version"], capture_output=True, text=True, check=True
    )
    assert version.stdout.startswith("lorakit ")


def test_an_existing_output_is_refused_before_pytorch_is_imported(tmp_path):
    """Commands read adapters and bases with PyTorch, so none is read."""
    (tmp_path / "out.jsonl").write_text("mine")
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "config.json").write_text("{}")
    calls = [
        "predict --adapter a --data.test new.csv --output out.jsonl",
        "evaluate --adapter a --data.test new.csv --output out.jsonl",
        "generate --adapter a --prompt x --output out.jsonl",
        "merge a merged",
    ]
    code = f"""
import sys
from lorakit.cli import main
print([main(call.split()) for call in {calls}], "torch" in sys.modules)
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert ended.stdout == "[1, 1, 1, 1] False\n"
    assert ended.stderr.count("already exists") == 4
    assert (tmp_path / "out.jsonl").read_text() == "mine"


@pytest.mark.parametrize("command", ["train", "plan"])
def test_help_lists_the_settings_of_every_method(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help", "all"])
    out = capsys.readouterr().out
    sections = {field.name: field.default_factory for field in dataclasses.fields(TrainConfig)}
    for method in SECTIONS:
        for setting in dataclasses.fields(sections[method]):
            assert re.search(rf"--{method}\.{setting.name}[ ,\n]", out)
