"""Help: the options that matter, in groups, without importing torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lorakit.cli import COMMANDS, main


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")


def help_of(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit):
        main(argv)
    return capsys.readouterr().out


def flags(text: str) -> list[str]:
    return [line.split()[0] for line in text.splitlines() if line.startswith("  --")]


def test_the_short_help_of_training(capsys) -> None:
    text = help_of(capsys, "train", "--help")
    options = [flag for flag in flags(text) if flag not in ("--config", "--help")]
    assert len(options) == 15
    headings = [line for line in text.splitlines() if line.endswith(":") and line[0] != " "]
    assert headings == ["model:", "data:", "method:", "training:", "output:"]
    usages = [line for line in text.splitlines() if "usage: " in line]
    needed = "--base.name NAME --output OUTPUT --data.train TRAIN"
    assert usages == [f"usage: lorakit train {needed} [--option VALUE ...]"]
    assert len(text.splitlines()) < 60


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "analyze"])
def test_no_help_is_longer_than_a_page(command: str, capsys) -> None:
    text = help_of(capsys, command, "--help")
    assert len(text.splitlines()) < 75
    assert text.count("usage:") == 1
    assert "Usage" not in text


@pytest.mark.parametrize(
    ("command", "own"),
    [
        ("compress", ["--adapter", "--output", "--rank", "--energy"]),
        ("combine", ["--adapters", "--rank", "--energy", "--weights", "--how", "--density"]),
        ("extract", ["--tuned", "--output", "--rank", "--energy", "--targets", "--train_modules"]),
        ("convert", ["--adapter", "--output", "--to"]),
    ],
)
def test_the_commands_own_options_come_first(command: str, own: list[str], capsys) -> None:
    text = help_of(capsys, command, "--help")
    assert flags(text)[: len(own)] == own
    assert ("set this or energy" in text) == (command in ("compress", "extract"))


@pytest.mark.parametrize("width", [80, 40])
@pytest.mark.parametrize("argv", [["train", "--help"], ["compress", "--help", "all"]])
def test_help_fits_the_terminal(argv: list[str], width: int, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    lines = help_of(capsys, *argv).splitlines()
    assert max(len(line) for line in lines if " " in line.strip()) <= width


def test_the_list_of_commands_fits_the_terminal(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["--help"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_help_of_a_command_in_both_orders(capsys) -> None:
    assert help_of(capsys, "help", "compress") == help_of(capsys, "compress", "--help")


CODE = """
import contextlib, io, sys
from lorakit.cli import COMMANDS, main
for argv in {calls}:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main(argv)
    if "torch" in sys.modules or "transformers" in sys.modules:
        sys.exit(" ".join(argv))
"""


@pytest.mark.parametrize(
    "calls",
    [
        "(['--help'], ['train', '--help'])",
        pytest.param("[[c, '--help', 'all'] for c in COMMANDS]", marks=pytest.mark.slow),
    ],
    ids=["train", "every command"],
)
def test_help_imports_no_torch(calls: str) -> None:
    code = CODE.format(calls=calls)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
