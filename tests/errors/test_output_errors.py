"""Outputs that another run locks, or that would replace files of other programs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from user_mistakes import ROWS, FullAfter, Shell, refused, run_config

import lorakit
from lorakit import storage
from lorakit.cli import main
from lorakit.errors import RunFolderError
from lorakit.training import checkpoint

# --- in use by another run ------------------------------------------------------------------------

HOLD = """
import sys
from lorakit import storage
with storage.lock_folder("run"):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_output_folder_in_use_by_another_run(shell: Shell, base: str, data: str) -> None:
    run = f"train --base.name {base} --data.train {data} --output run"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        try:
            assert other.stdout.readline() == "locked\n"
            for options in ("", " --resume true", " --overwrite true"):
                shell.refuses(run + options, "run", "in use by another run", "folder")
        finally:
            other.stdin.close()
    assert main(run.split()) == 0


def test_output_folder_in_use_by_this_process(shell: Shell, base: str, data: str) -> None:
    with storage.lock_folder("run"):
        shell.refuses(
            f"train --base.name {base} --data.train {data} --output run",
            "in use by another run",
        )


# --- output folders that hold something else ------------------------------------------------------

OVERWRITES = {
    "convert": "convert adapter precious",
    "merge": "merge adapter precious --base.name {base}",
    "train": "train --base.name {base} --data.train {data} --max_steps 1 --output precious",
}
FOREIGN = {
    "a thesis": ["thesis.tex"],
    "a project with a config.yaml": ["config.yaml", "checkpoints/last.ckpt", "train.py"],
    "names of a run's": ["adapter/thesis.tex", "best/thesis.tex"],
    "an adapter and checkpoints": ["adapter_config.json", "checkpoint-10/optimizer.pt"],
    "a model and notes": ["config.json", "model.safetensors", "notes.txt"],
}


@pytest.mark.parametrize("files", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("command", OVERWRITES.values(), ids=OVERWRITES)
def test_overwrite_deletes_nothing_of_others(
    command: str, files: list[str], shell: Shell, adapter: Path, base: str, data: str
) -> None:
    for name in files:
        path = Path("precious", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("years: of work\n")
    line = command.format(base=base, data=data)
    shell.refuses(line, "precious")
    shell.refuses(f"{line} --overwrite true", "precious")


@pytest.mark.parametrize("output", ["adapter", "model", "."])
def test_merge_does_not_replace_what_it_reads(
    output: str, shell: Shell, adapter: Path, base: str
) -> None:
    shutil.copytree(base, "model")
    shell.refuses(f"merge adapter {output} --base.name model --overwrite true", output)


def test_merge_does_not_replace_its_base_under_another_spelling(
    shell: Shell, adapter: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """macOS' disks ignore the case of letters, and its `realpath` keeps it."""
    shutil.copytree(base, "models/base")
    Path("Models").symlink_to("models")
    monkeypatch.setattr(os.path, "realpath", lambda path, **_: os.path.abspath(path))
    shell.refuses(
        "merge adapter Models/base --base.name models/base --overwrite true", "is the base"
    )


@pytest.mark.slow
def test_resume_on_a_base_that_has_changed(
    shell: Shell, bases: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resuming would train an adapter for two different bases."""
    shutil.copytree(bases / "base", "model")
    full = FullAfter(checkpoint.write_safetensors, 4)  # in the second checkpoint
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write_safetensors", full)
        with refused(RunFolderError, "disk full"):
            lorakit.train(run_config("model", data, Path("run")))
    shutil.rmtree("model")
    shutil.copytree(bases / "retrained", "model")
    shell.refuses("train --config run/config.yaml --resume true", "run", "base", "changed")


# --- an output that already exists ----------------------------------------------------------------

IN_THE_WAY = {
    "merge": ("merge nowhere taken", "folder"),
    "convert": ("convert nowhere taken", "folder"),
    "convert to loralib": ("convert nowhere taken --to loralib", "file"),
    "generate": ("generate --base.name nowhere --prompt hi --output taken.jsonl", "file"),
    "evaluate": (
        "evaluate --base.name nowhere --data.test nowhere.jsonl --output taken.jsonl",
        "file",
    ),
}


@pytest.mark.parametrize(("command", "kind"), IN_THE_WAY.values(), ids=IN_THE_WAY)
def test_an_output_in_the_way_is_seen_before_anything_is_read(
    command: str, kind: str, shell: Shell, adapter: Path
) -> None:
    """The check runs before any input is read, so that no work is lost; the inputs here do not exist."""
    taken = Path(next(word for word in command.split() if word.startswith("taken")))
    if kind == "folder":
        shutil.copytree(adapter, taken)
    else:
        taken.write_text("years of work\n")
    shell.refuses(command, "taken", "already exists", "overwrite")
    taken.rename("other")
    taken.write_text("") if kind == "folder" else taken.mkdir()
    wrong = "is a file" if kind == "folder" else "is a folder"
    for overwrite in ("", " --overwrite true"):
        shell.refuses(command + overwrite, "taken", wrong)


@pytest.mark.parametrize(("command", "kind"), IN_THE_WAY.values(), ids=IN_THE_WAY)
def test_an_output_that_cannot_be_written_is_seen_before_anything_is_read(
    command: str, kind: str, shell: Shell
) -> None:
    Path("file").touch()
    for where in ("file/below", "a" * 300):
        shell.refuses(command.replace("taken", where), "annot write")


def test_overwrite_replaces_texts(shell: Shell, base: str) -> None:
    Path("out.jsonl").write_text("old\n")
    line = f"generate --base.name {base} --prompt river --decoding.max_new_tokens 2"
    assert main(f"{line} --output out.jsonl --overwrite true".split()) == 0
    assert json.loads(Path("out.jsonl").read_text())["prompt"] == "river"


@pytest.mark.slow
def test_overwrite_replaces_scores(shell: Shell, base: str, data: str) -> None:
    Path("out.jsonl").write_text("old\n")
    line = f"evaluate --base.name {base} --data.test {data} --decoding.max_new_tokens 2"
    assert main(f"{line} --output out.jsonl --overwrite true".split()) == 0
    assert len(Path("out.jsonl").read_text().splitlines()) == len(ROWS)
