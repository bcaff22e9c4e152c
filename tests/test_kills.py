"""A save is whole or absent: under a kill at any instant, on a full disk, and after a power cut."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from failing_saves import REFUSED, SAVED, fill_disk, in_child, kill
from torch import nn
from transformers import AutoModelForCausalLM

import lorakit
from lorakit import storage
from lorakit.cli import main
from lorakit.errors import RunFolderError
from lorakit.storage import atomic

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")

OLD = {"a.txt": b"old a", "only-old.txt": b"x"}
NEW = {"a.txt": b"new a, and longer", "sub/b.txt": b"new b"}
STEPS = range(1, 22)
"""Changes of the disk at which a save fails. A save has 5 to 20; a later step does not come, and it succeeds."""
FAILURES = [*[(kill, step) for step in STEPS], *[(fill_disk, step) for step in STEPS[::2]]]
SITUATIONS = {
    "folder": ["new", "replace", "replace-without-exchange"],
    "file": ["new", "replace"],
}


def write_tree(folder: Path, content: dict[str, bytes]) -> None:
    for name, data in content.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(data)


def save_folder(target: Path) -> None:
    with storage.atomic_folder(target, overwrite=True) as temporary:
        write_tree(temporary, NEW)


def save_file(target: Path) -> None:
    with storage.atomic_file(target) as temporary:
        temporary.write_bytes(NEW["a.txt"])


def content(target: Path) -> Any:
    if target.is_dir():
        files = (path for path in target.rglob("*") if path.is_file())
        return {str(path.relative_to(target)): path.read_bytes() for path in files}
    return target.read_bytes() if target.exists() else None


@dataclass
class Save:
    """A save to `target`: what is there before, and after it."""

    target: Path
    to: Callable[[Path], None]
    new: Any
    old: Any
    swaps: bool
    """A single step replaces the target."""

    def __call__(self) -> None:
        self.to(self.target)


@pytest.fixture(
    params=[(kind, how) for kind in SITUATIONS for how in SITUATIONS[kind]], ids="-".join
)
def save(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Save:
    """Prepare a save. Without the exchange of Linux, as on macOS, two renames replace a folder."""
    kind, situation = request.param
    target = tmp_path / "target"
    if situation != "new" and kind == "folder":
        write_tree(target, OLD)
    elif situation != "new":
        target.write_bytes(OLD["a.txt"])
    swaps = situation != "replace-without-exchange" and sys.platform == "linux"
    if not swaps:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    to, new = (save_folder, NEW) if kind == "folder" else (save_file, NEW["a.txt"])
    return Save(target, to, new, content(target), swaps)


@pytest.mark.parametrize(("fail", "step"), FAILURES)
def test_a_save_that_ends_at_any_step_leaves_old_or_new(
    save: Save, fail: Callable[[], None], step: int
) -> None:
    status = in_child(save, step, fail)
    assert status in (SAVED, REFUSED if fail is fill_disk else -signal.SIGKILL)
    folder, target = save.target.parent, save.target
    if save.swaps:
        assert content(target) in (save.old, save.new)
    if fail is kill:  # the next save there, or resumed run, does this
        storage.remove_leftovers(folder)
    assert (
        content(target) == save.new if status == SAVED else content(target) in (save.old, save.new)
    )
    assert os.listdir(folder) == ([] if content(target) is None else ["target"])
    save()
    assert content(target) == save.new
    assert os.listdir(folder) == ["target"]


def test_the_steps_cover_a_whole_save(save: Save) -> None:
    assert in_child(save, STEPS[-1], kill) == SAVED


@pytest.mark.parametrize("step", range(1, 24))
def test_a_kill_while_an_adapter_is_saved_leaves_the_old_or_the_new_one(
    tmp_path: Path, step: int
) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    adapters = lorakit.attach(model, lorakit.LoRA(rank=2, targets=["0"]))
    outputs = []
    for seed in (1, 2):
        with torch.no_grad():
            for parameter in adapters.trainable_parameters():
                parameter.normal_(generator=torch.Generator().manual_seed(seed))
        outputs.append(model(torch.eye(4)))
        if seed == 1:
            adapters.save(tmp_path / "adapter")
    status = in_child(lambda: adapters.save(tmp_path / "adapter", overwrite=True), step, kill)
    assert status in (SAVED, -signal.SIGKILL)
    adapters.detach()
    lorakit.load(model, tmp_path / "adapter")
    found = model(torch.eye(4))
    assert torch.equal(found, outputs[1]) or (status != SAVED and torch.equal(found, outputs[0]))


MERGE = ["merge", "adapter", "merged", "--base.dtype", "float32", "--overwrite", "true"]


@pytest.fixture(scope="module")
def merged_before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter, the model that another adapter was merged into, and what a merge is to write."""
    folder = tmp_path_factory.mktemp("merge")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tiny_runs.save_base(folder / "base")
        base = lorakit.load_base("base", dtype="float32").model
        handle = lorakit.attach(base, lorakit.LoRA(rank=2))
        handle.save("adapter")
        assert main(MERGE) == 0
        with torch.no_grad():
            for parameter in handle.trainable_parameters():
                parameter.fill_(0.5)
        handle.save("adapter", overwrite=True)
        assert main([*MERGE[:2], "expected", *MERGE[3:]]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, 32))
def test_a_kill_during_a_merge_leaves_the_old_or_the_new_model(
    merged_before: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    shutil.copytree(merged_before, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    old = content(Path("merged"))
    status = in_child(lambda: main(MERGE), step, kill)
    assert status in (SAVED, -signal.SIGKILL)
    AutoModelForCausalLM.from_pretrained("merged")
    expected = [content(Path("expected"))] if status == SAVED else [content(Path("expected")), old]
    assert content(Path("merged")) in expected
    storage.remove_leftovers(Path())
    assert sorted(os.listdir()) == ["adapter", "base", "expected", "merged"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("needs the permission to mount a file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_keeps_the_old_adapter(small_disk: Path) -> None:
    """safetensors writes in Rust, and has errors of its own."""
    model = nn.Sequential(nn.Linear(5_000, 4))
    adapters = lorakit.attach(model, lorakit.LoRA(rank=4, targets=["0"]))
    adapters.save(small_disk / "adapter")
    old = content(small_disk / "adapter")
    filler = small_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free))
    with pytest.raises(
        RunFolderError, match=r"disk full while writing .*adapter'.*Free some space"
    ):
        adapters.save(small_disk / "adapter", overwrite=True)
    assert content(small_disk / "adapter") == old
    filler.unlink()
    adapters.save(small_disk / "adapter", overwrite=True)
    assert os.listdir(small_disk) == ["adapter"]


def test_everything_is_flushed_before_the_rename_and_the_rename_before_the_end(
    save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut loses what is not flushed; what a killed process has written is not lost."""
    flushed: list[int | str] = []

    def flush(file: int, fsync: Callable[[int], None] = os.fsync) -> None:
        flushed.append(os.fstat(file).st_ino)
        fsync(file)

    monkeypatch.setattr(os, "fsync", flush)
    for owner, name in ((os, "replace"), (atomic, "_exchange")):
        original = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *names, do=original: (flushed.append("rename"), do(*names))[1]
        )
    save()
    before = flushed[: flushed.index("rename")]
    assert {path.stat().st_ino for path in (save.target, *save.target.rglob("*"))} == {*before}
    assert flushed[-1] == save.target.parent.stat().st_ino
