"""Access to run folders, and the files that overwriting deletes."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch

from lorakit import storage
from lorakit.errors import ConfigurationError, DataError, RunFolderError
from lorakit.training import checkpoint
from lorakit.training.checkpoint import State
from lorakit.training.config import HeldOutConfig
from lorakit.training.distributed import Processes
from lorakit.training.loop import train
from lorakit.training.run_folder import RunFolder, adapter_of_run


def test_a_finished_run_is_refused_resumed_as_it_is_or_overwritten(tmp_path, base) -> None:
    config = tiny_runs.config(tmp_path, base, max_steps=2)
    first = train(config)
    with pytest.raises(RunFolderError, match=r"finished run.*resume.*overwrite"):
        train(config)
    resumed = train(dataclasses.replace(config, resume=True))
    assert resumed == first
    other = dataclasses.replace(config, overwrite=True, seed=1)
    assert train(other).scores != first.scores


def test_overwriting_deletes_nothing_that_is_not_a_run(tmp_path: Path, base: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    config = tiny_runs.config(tmp_path, base, overwrite=True)
    with pytest.raises(RunFolderError, match=r"not a run folder.*thesis\.tex"):
        train(config)
    assert (tmp_path / "run" / "thesis.tex").read_text() == "years of work"


def test_a_lock_file_that_is_open_does_not_hide_the_error_of_a_new_run(
    tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows refuses to delete an open file."""
    unlink = Path.unlink

    def unlink_closed(path: Path, missing_ok: bool = False) -> None:
        if path.name == storage.LOCK_NAME:
            raise PermissionError(13, "used by another process", str(path))
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink_closed)
    config = tiny_runs.config(tmp_path, base)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, train="missing.csv"))
    with pytest.raises(DataError, match=r"missing\.csv"):
        train(config)
    (tmp_path / "run" / storage.LOCK_NAME).write_text("")  # the folder can be used
    with pytest.raises(DataError, match=r"missing\.csv"):
        train(config)


def test_a_restart_of_torchrun_does_not_overwrite_what_it_has_trained(
    tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_runs.config(tmp_path, base, overwrite=True, max_steps=1)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train(config)  # the first start failed before it wrote anything
    with pytest.raises(ConfigurationError, match="torchrun has restarted"):
        train(config)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    train(config)


@pytest.mark.slow
def test_overwriting_a_run_keeps_the_users_own_files(tmp_path: Path, base: str) -> None:
    config = tiny_runs.config(tmp_path, base, max_steps=1)
    train(config)
    (tmp_path / "run" / "notes.md").write_text("mine")
    train(dataclasses.replace(config, overwrite=True))
    assert (tmp_path / "run" / "notes.md").read_text() == "mine"


@pytest.mark.parametrize(
    ("setting", "source"),
    [
        ("from_adapter", "run/adapter"),
        ("from_adapter", "{folder}/run/adapter"),
        ("from_adapter", "link/adapter"),
        ("from_adapter", "RUN/adapter"),
        ("data.train", "run/samples.jsonl"),
    ],
)
def test_overwriting_spares_the_inputs_of_the_new_run(
    tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch, setting: str, source: str
) -> None:
    monkeypatch.chdir(tmp_path)
    source = source.format(folder=tmp_path)
    config = tiny_runs.config(tmp_path, base, overwrite=True)
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text(storage.dump_yaml(config.as_dict()))
    tiny_runs.write_rows(tmp_path / "run" / "samples.jsonl", tiny_runs.pairs(8))
    (tmp_path / "link").symlink_to(tmp_path / "run")
    # One folder under two names, as on the disks of macOS: `realpath` keeps both.
    (tmp_path / "RUN").symlink_to(tmp_path / "run")
    real = os.path.realpath
    monkeypatch.setattr(
        os.path,
        "realpath",
        lambda path, **strict: path if "RUN" in str(path) else real(path, **strict),
    )
    if setting == "from_adapter":
        config = dataclasses.replace(config, from_adapter=source)
    else:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, train=source))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RunFolderError, match=rf"\({setting} {source}\).*Choose another output"):
        train(config)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_as_output_is_refused(tmp_path: Path, base: str) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(RunFolderError, match="is a file"):
        train(tiny_runs.config(tmp_path, base))


def test_a_session_deletes_what_a_killed_one_left(tmp_path: Path) -> None:
    """As after a signal at step 137 and a kill in that checkpoint: no later checkpoint has its name."""
    config = tiny_runs.config(tmp_path, "base")
    leftovers = [
        tmp_path / "run" / f"{name}.tmp-0123456789ab"
        for name in (".best", "checkpoints/.step-000137")
    ]
    for folder in leftovers:
        folder.mkdir(parents=True)
        (folder / "weights.safetensors").write_bytes(b"half")
    RunFolder(tmp_path / "run", config).begin(State(), torch.device("cpu"), {}, {})
    assert not any(map(Path.exists, leftovers))


def test_the_command_that_resumes_on_several_machines(tmp_path: Path, monkeypatch) -> None:
    run = RunFolder(tmp_path / "run", tiny_runs.config(tmp_path, "base"))
    run.path.mkdir()
    run.begin(State(), torch.device("cpu"), {}, {})
    command = f"-m lorakit train --config {run.path / 'config.yaml'} --resume"
    for here, options in (("16", "--nproc-per-node 16"), ("8", "SAME_OPTIONS")):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
        assert run.resume_command(Processes(count=16)) == f"torchrun {options} {command}"


def test_a_finished_run_that_lost_its_adapter_has_no_result_until_it_ends(tmp_path: Path) -> None:
    """The report would show the old scores beside the new metrics, and a kill leave a finished run."""
    run = RunFolder(tmp_path / "run", tiny_runs.config(tmp_path, "base"))
    run.path.mkdir()
    (run.path / "result.json").write_text("{}")
    run.adapter.mkdir()  # only its files were deleted
    assert run.result() is None
    run.begin(State(), torch.device("cpu"), {}, {})
    assert not (run.path / "result.json").exists()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ((), None),
        (("best/lorakit.json",), "best"),
        (("best/lorakit.json", "adapter/adapter_config.json"), "adapter"),
        (("best/lorakit.json", "adapter/adapter_model.safetensors"), "best"),
        (("adapter/lorakit.json",), "adapter"),
        (("best/README.md", "adapter/README.md"), None),
    ],
)
def test_the_adapter_of_a_run_is_the_last_one_else_the_best(
    tmp_path: Path, files: tuple[str, ...], expected: str | None
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert adapter_of_run(tmp_path) == (None if expected is None else tmp_path / expected)


def test_files_of_an_editor_in_best_do_not_end_a_run(
    tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    begin = RunFolder.begin

    def begin_and_edit(run: RunFolder, *args: Any, **settings: Any) -> None:
        begin(run, *args, **settings)
        (run.path / "best-kept-1").mkdir()
        run.best.mkdir()
        (run.best / ".README.md.swp").write_text("notes")

    monkeypatch.setattr(RunFolder, "begin", begin_and_edit)
    best = train(tiny_runs.config(tmp_path, base, max_steps=1)).best
    assert best is not None
    assert [*best.glob("adapter_model.*")]
    assert (tmp_path / "run" / "best-kept-2" / ".README.md.swp").read_text() == "notes"
    assert "best-kept-2', to keep .README.md.swp" in caplog.text


@pytest.mark.slow
def test_metrics_and_samples_are_on_the_disk_before_each_checkpoint(
    tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut can lose what was appended to a file and keep a checkpoint that was flushed later."""
    synced, checks = {}, 0
    fsync, save = os.fsync, checkpoint.save

    def recording(descriptor: int) -> None:
        synced[os.fstat(descriptor).st_ino] = os.fstat(descriptor).st_size
        fsync(descriptor)

    def checking(*args: Any, **settings: Any) -> None:
        nonlocal checks
        files = [tmp_path / "run" / f"{name}.jsonl" for name in ("metrics", "samples")]
        assert [synced[file.stat().st_ino] for file in files] == [f.stat().st_size for f in files]
        checks += 1
        save(*args, **settings)

    monkeypatch.setattr(os, "fsync", recording)
    monkeypatch.setattr(checkpoint, "save", checking)
    evaluation = HeldOutConfig(samples=1, max_new_tokens=1)
    train(tiny_runs.config(tmp_path, base, max_steps=1, evaluation=evaluation))
    assert checks
