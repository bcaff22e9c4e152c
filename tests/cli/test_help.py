"""Help: the options that matter, in groups, without importing torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lorakit.cli import COMMANDS, main
from lorakit.cli.options import options_of
from lorakit.training.config import TrainConfig


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
    assert usages == ["usage: lorakit train --base.name NAME --output OUTPUT [--option VALUE ...]"]
    assert len(text.splitlines()) < 60


def test_the_long_help_has_every_option(capsys) -> None:
    text = help_of(capsys, "train", "--help", "all")
    assert {f"--{name}" for name in options_of(TrainConfig)} <= set(flags(text))


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "analyze"])
def test_no_help_is_longer_than_a_page(command: str, capsys) -> None:
    text = help_of(capsys, command, "--help")
    assert len(text.splitlines()) < 75
    assert text.count("usage:") == 1
    assert "Usage" not in text


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
