"""Names and texts of untrusted files cannot control the terminal or forge a line of output."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import save_file

import lorakit
from lorakit.cli import main
from lorakit.errors import DataError

HIDDEN = "\x1b[2J\x9b1m\x7f\r\nlorakit: all is well\u202e\u2028\u2066"
SHOWN = r"\u001b[2J\u009b1m\u007f\r\nlorakit: all is well\u202e\u2028\u2066"


def assert_harmless(text: str) -> None:
    assert not [c for c in text if c != "\n" and not c.isprintable()]
    assert not [line for line in text.splitlines() if line.startswith("lorakit: all")]


def loralib_file(path: Path, name: str, *parts: str) -> Path:
    save_file({f"{name}.lora_{part}": torch.ones(2, 2) for part in parts}, path)
    return path


def test_tensor_names_in_errors(tmp_path: Path, capsys) -> None:
    path = loralib_file(tmp_path / "a.safetensors", HIDDEN, "A")
    assert main(["inspect", str(path)]) == 1
    error = capsys.readouterr().err
    assert_harmless(error)
    assert f"'{SHOWN}.lora_A' is not a name of loralib" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [["inspect", "{}"], ["convert", "{}", "output"], ["generate", "--config", "{}"], ["{}"]],
)
def test_file_names_in_errors(tmp_path: Path, capsys, words: list[str]) -> None:
    assert main([word.format(tmp_path / f"x{HIDDEN}") for word in words]) in (1, 2)
    error = capsys.readouterr().err
    assert_harmless(error)
    assert SHOWN in error


@pytest.mark.parametrize("layers", ["false", "true"])
def test_layer_names_in_tables(tmp_path: Path, capsys, layers: str) -> None:
    path = loralib_file(tmp_path / "a.safetensors", "a" + HIDDEN.replace("\n", ""), "A", "B")
    assert main(["inspect", str(path), "--layers", layers]) == 0
    output = capsys.readouterr().out
    assert_harmless(output)
    assert r"\u001b[2J" in output


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    model = tiny_models.build("llama")
    model.config._name_or_path = f"base{HIDDEN}"
    adapters = lorakit.attach(model, lorakit.LoRA(rank=2), name="a")
    return adapters.save(tmp_path / "a", provenance={f"key{HIDDEN}": f"value{HIDDEN}"})


def test_metadata(adapter: Path, capsys) -> None:
    assert main(["inspect", str(adapter)]) == 0
    output = capsys.readouterr().out
    assert_harmless(output)
    assert f"base: base{SHOWN}" in output
    assert f'key{SHOWN}: "value{SHOWN}"' in output


def test_json_stays_json(adapter: Path, capsys) -> None:
    assert main(["inspect", str(adapter), "--json", "true"]) == 0
    output = capsys.readouterr().out
    assert_harmless(output)
    assert json.loads(output)["base"]["name"] == f"base{HIDDEN}"


def test_notices(adapter: Path, tmp_path: Path, capsys) -> None:
    assert main(["convert", str(adapter), str(tmp_path / f"x{HIDDEN}.safetensors")]) == 0
    assert_harmless("".join(capsys.readouterr()))


def test_lines_of_a_message_stay_apart() -> None:
    error = DataError("first\x1b", "  second\nline")
    assert str(error) == "first\\u001b\n  second\\nline"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_other_scripts_and_emoji_are_printed(tmp_path: Path, capsys) -> None:
    name = "مرحبا-नमस्ते-日本-👩\u200d💻-é"
    assert main(["inspect", str(tmp_path / name)]) == 1
    assert name in capsys.readouterr().err
