"""A disk that is full at any of the writes."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny_runs import write_rows
from torch import nn
from user_mistakes import (
    ROWS,
    TENSORS,
    FullAfter,
    Shell,
    assert_says,
    disk_full,
    nothing_left,
    refused,
    run_config,
)

import lorakit
from lorakit.adapters import formats
from lorakit.cli import main
from lorakit.errors import (
    LorakitError,
    RunFolderError,
)
from lorakit.storage import tensors
from lorakit.training.run_folder import JsonLines, RunResult

# --- disk full ------------------------------------------------------------------------------------


WRITES = {
    "mkdir": (Path, "mkdir"),
    "tensors": (tensors, "save_file"),
    "bytes": (Path, "write_bytes"),
    "text": (Path, "write_text"),
    "fsync": (os, "fsync"),
    "rename": (os, "replace"),
}


@pytest.mark.parametrize("calls", [0, 1, 3])
@pytest.mark.parametrize("write", WRITES)
def test_disk_full_at_any_write_of_a_save(
    write: str, calls: int, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = lorakit.attach(model, lorakit.LoRA(rank=2))
    owner, name = WRITES[write]
    full = FullAfter(getattr(owner, name), calls)
    with nothing_left(tmp_path), monkeypatch.context() as patched:
        patched.setattr(owner, name, lambda *args, **kwargs: full(*args, **kwargs))
        try:
            adapters.save(tmp_path / "adapter")
        except RunFolderError as error:
            assert_says(str(error), ("disk full", "adapter", "free some space"))
        else:  # the save made fewer calls
            assert full.left >= 0
            shutil.rmtree(tmp_path / "adapter")
    assert full.left == 0 or calls


@pytest.mark.parametrize("write", ["tensors", "bytes", "fsync"])
def test_disk_full_while_replacing_an_adapter(
    write: str,
    adapter: Path,
    model: nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapters = lorakit.attach(model, lorakit.LoRA(rank=2))
    with nothing_left(tmp_path), monkeypatch.context() as patched:
        patched.setattr(*WRITES[write], disk_full)
        with refused(RunFolderError, "disk full", "nothing was changed"):
            adapters.save(adapter, overwrite=True)
    assert formats.read(adapter).layers


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system with 4 KiB left."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=32k", "lorakit-test", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root may mount a small disk; the injected errors are tested above")
    try:
        (folder / "filler").write_bytes(bytes(28 << 10))
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(
    "command",
    [
        "merge adapter disk/new --base.name {base}",
        "convert adapter disk/new",
        "convert adapter disk/new.bin --to loralib",
        "generate --base.name {base} --prompt river --output disk/new.jsonl --decoding.max_new_tokens 2",
        "train --base.name {base} --data.train {data} --output disk/new",
    ],
    ids=["merge", "convert to peft", "convert to loralib", "generate", "train"],
)
def test_really_full_disk(
    command: str, small_disk: Path, shell: Shell, adapter: Path, base: str, data: str
) -> None:
    if command.startswith(("generate", "train")):  # their first writes are small
        with (small_disk / "filler").open("ab") as file:
            file.write(bytes(4 << 10))
    shell.refuses(command.format(base=base, data=data), "disk full", "disk/new", "free some space")


def test_save_to_a_really_full_disk(small_disk: Path, model: nn.Module, tmp_path: Path) -> None:
    adapters = lorakit.attach(model, lorakit.LoRA(rank=2))
    with nothing_left(tmp_path), refused(RunFolderError, "disk full", "free some space"):
        adapters.save(small_disk / "adapter")


IN_A_RUN = {
    "fsync": (os, "fsync"),
    "metrics": (JsonLines, "_write"),
    "tensors": (tensors, "save_file"),
    "settings": (Path, "write_text"),
    "records": (Path, "write_bytes"),
}


@dataclass(frozen=True)
class Undisturbed:
    """A run with space enough, and how often it called each function of IN_A_RUN."""

    result: RunResult
    calls: dict[str, int]


@pytest.fixture(scope="module")
def undisturbed(base: str, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder, plenty = tmp_path_factory.mktemp("undisturbed"), 10**6
    data = write_rows(folder / "train.jsonl", ROWS)
    counters = {w: FullAfter(getattr(*place), plenty) for w, place in IN_A_RUN.items()}
    with pytest.MonkeyPatch.context() as patched:
        for write, place in IN_A_RUN.items():
            patched.setattr(*place, lambda *args, full=counters[write], **kw: full(*args, **kw))
        result = lorakit.train(run_config(base, data, folder / "run"))
    return Undisturbed(result, {write: plenty - full.left for write, full in counters.items()})


@pytest.mark.parametrize("step", [0, 1])
def test_a_run_with_a_checkpoint_gets_the_command_that_resumes_it(
    step: int,
    base: str,
    data: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    full, run = FullAfter(JsonLines._write, step), tmp_path / "run"
    monkeypatch.setattr(JsonLines, "_write", lambda *args: full(*args))
    command = f"train --base.name {base} --data.train {data} --output {run} --checkpoints.every 1"
    assert main(command.split()) == 1
    expected = f"The run can go on from its checkpoint: lorakit train --config {run}/config.yaml --resume\n"
    assert (expected in capsys.readouterr().err) == (step > 0)


def test_a_full_disk_of_tensorboard_names_the_command_too(
    base: str,
    data: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    full, close, run = FullAfter(SummaryWriter.add_scalar, 8), SummaryWriter.close, tmp_path / "run"

    def close_and_fail(writer: SummaryWriter) -> None:
        close(writer)
        disk_full()

    monkeypatch.setattr(SummaryWriter, "add_scalar", lambda *args: full(*args))
    monkeypatch.setattr(SummaryWriter, "close", close_and_fail)
    command = (
        f"train --base.name {base} --data.train {data} --output {run} --checkpoints.every 1 "
        "--loggers tensorboard"
    )
    assert main(command.split()) == 1
    err = capsys.readouterr().err
    assert f"disk full while writing '{run / 'tensorboard'}'" in err
    assert f"The run can go on from its checkpoint: lorakit train --config {run}" in err


@pytest.mark.slow
@pytest.mark.parametrize("share", [0, 0.3, 0.7, 1], ids=["first", "early", "late", "last"])
@pytest.mark.parametrize("write", IN_A_RUN)
def test_disk_full_in_a_run(
    write: str,
    share: float,
    base: str,
    data: str,
    undisturbed: Undisturbed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Earlier checkpoints stay intact: with free space, the run resumes and ends with the same weights."""
    owner, name = IN_A_RUN[write]
    full = FullAfter(getattr(owner, name), int(share * (undisturbed.calls[write] - 1)))
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, lambda *args, **kwargs: full(*args, **kwargs))
        with refused(LorakitError, "disk full", "run", "free some space"):
            lorakit.train(run_config(base, data, tmp_path / "run"))
    assert not [path for path in (tmp_path / "run").rglob("*") if ".tmp-" in path.name]
    result = lorakit.train(run_config(base, data, tmp_path / "run", resume=True))
    expected = undisturbed.result.adapter / TENSORS
    assert (result.adapter / TENSORS).read_bytes() == expected.read_bytes()
