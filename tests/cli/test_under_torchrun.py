"""Commands in processes that torchrun has started."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorakit.cli import COMMANDS, main


@pytest.fixture
def error_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The environment of the first of two processes, and the file that torchrun reads."""
    file = tmp_path / "error.json"
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "TORCHELASTIC_ERROR_FILE": str(file),
    }.items():
        monkeypatch.setenv(name, value)
    return file


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "train"])
def test_commands_that_cannot_share_their_work_do_not_start(
    error_file: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert main([command]) == 2
    message = (
        f"lorakit {command}: torchrun started this command in 2 processes, but only lorakit train shares its work "
        f"between processes. Run 'lorakit {command}' without torchrun."
    )
    assert capsys.readouterr().err == f"{message}\n"
    assert json.loads(error_file.read_text())["message"]["message"] == message


def test_the_first_process_prints_for_all(
    error_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["evaluate"]) == 2
    assert capsys.readouterr().err == ""
    assert error_file.exists()


@pytest.mark.parametrize(("name", "value"), [("LOCAL_RANK", None), ("WORLD_SIZE", "1")])
def test_a_command_starts_once_elsewhere(
    error_file: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str | None
) -> None:
    """A cluster can set WORLD_SIZE for its own purposes."""
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    assert main(["recipes"]) == 0
    assert not error_file.exists()


def test_torchrun_learns_the_error_of_a_command(error_file: Path) -> None:
    """torchrun itself reads the file."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    assert main(["train", "--lora.rnk", "4"]) == 1
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(error_file))
    assert "Did you mean '--lora.rank'?" in ChildFailedError("lorakit", {0: failure}).format_msg()
