"""Saves are atomic, whatever fails and whenever the process dies."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import time
import tracemalloc
import warnings
from collections.abc import Callable
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch

from lorakit import storage
from lorakit.errors import AdapterFileError, DataError, RunFolderError
from lorakit.storage import atomic, records
from lorakit.storage.tensors import read_safetensors, write_safetensors

OLD = {"a.txt": b"old a", "sub/b.txt": b"old b", "only-old.txt": b"x"}
NEW = {"a.txt": b"new a, and longer", "sub/b.txt": b"new b"}
SOURCES = Path(storage.__file__).parents[2]


def write_tree(folder: Path, content: dict[str, bytes]) -> None:
    for name, data in content.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)


def read_tree(folder: Path) -> dict[str, bytes] | None:
    if not folder.exists():
        return None
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def save_folder(target: Path) -> None:
    with storage.atomic_folder(target, overwrite=True) as temporary:
        write_tree(temporary, NEW)


def save_file(target: Path) -> None:
    with storage.atomic_file(target) as temporary:
        temporary.write_bytes(NEW["a.txt"])


class InjectedError(Exception):
    """An injected failure that no code expects."""


WRITES = (
    *((os, "fsync"), (os, "replace"), (atomic, "_exchange")),
    *((Path, "write_bytes"), (Path, "mkdir"), (Path, "touch")),
)
REMOVALS = ((os, "rmdir"), (os, "unlink"), (atomic.shutil, "rmtree"))


@contextmanager
def failure_at(
    monkeypatch: pytest.MonkeyPatch,
    call: int,
    fail: Callable[[], None],
    after: bool,
    calls: tuple[tuple[Any, str], ...] = WRITES,
):
    """Make the call-th of these calls fail, by default those that write, flush, rename or create something."""
    seen: list[str] = []

    def failing(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            if len(seen) != call:
                return original(*args, **kwargs)
            if after:
                original(*args, **kwargs)
            elif name == "write_bytes":  # the disk fills up halfway
                original(args[0], args[1][: len(args[1]) // 2])
            fail()

        return step

    with monkeypatch.context() as patch:
        for owner, name in calls:
            patch.setattr(owner, name, failing(name, getattr(owner, name)))
        yield seen


def raise_disk_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def raise_unexpected() -> None:
    raise InjectedError


def without_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)


SITUATIONS = ["new", "replace", "replace-without-exchange"]


def prepare(situation: str, parent: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    target = parent / "made" / "on the way" / "target" if situation == "new" else parent / "target"
    if situation != "new":
        if kind == "folder":
            write_tree_at(target)
        else:
            target.write_bytes(OLD["a.txt"])
    if situation.endswith("without-exchange"):
        without_exchange(monkeypatch)
    return target


def write_tree_at(target: Path) -> None:
    target.mkdir()
    write_tree(target, OLD)


def content(target: Path, kind: str) -> Any:
    if kind == "folder":
        return read_tree(target)
    return target.read_bytes() if target.exists() else None


@pytest.mark.parametrize("kind", ["folder", "file"])
@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("fail", "raised"),
    [(raise_disk_full, RunFolderError), (raise_unexpected, InjectedError)],
    ids=["disk-full", "unexpected"],
)
def test_a_failure_of_any_step_leaves_old_or_new_and_nothing_else(
    tmp_path, monkeypatch, kind, situation, after, fail, raised
):
    save = save_folder if kind == "folder" else save_file
    new = NEW if kind == "folder" else NEW["a.txt"]
    call, kept_old = 0, 0
    while True:
        call += 1
        parent = tmp_path / str(call)
        parent.mkdir()
        with monkeypatch.context() as patch:
            target = prepare(situation, parent, kind, patch)
            old = content(target, kind)
            with failure_at(patch, call, fail, after) as seen:
                try:
                    save(target)
                except raised as error:
                    failed = error
                else:
                    break
        assert len(seen) >= call
        found = content(target, kind)
        assert found in (old, new)
        kept_old += found == old
        assert os.listdir(parent) == (
            [] if found is None else [target.relative_to(parent).parts[0]]
        )
        if raised is RunFolderError:
            assert "disk full" in str(failed)
        if not after and situation != "replace-without-exchange":
            assert found == old, f"call {call} ({seen[-1]}) changed the target and then failed"
    assert content(target, kind) == new
    assert kept_old >= 2


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot flush a folder")
@pytest.mark.parametrize("kind", ["folder", "file"])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_everything_is_flushed_before_the_rename_and_the_rename_before_the_end(
    tmp_path, monkeypatch, kind, situation
):
    """A power cut loses what is not flushed; what a killed process has written is not lost."""
    target = prepare(situation, tmp_path, kind, monkeypatch)
    before: set[int] = set()
    flushed: set[int] = set()

    def renaming(original: Callable[..., Any]) -> Callable[..., Any]:
        def rename(*names: Any) -> Any:
            before.update(flushed)
            flushed.clear()
            return original(*names)

        return rename

    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (flushed.add(os.fstat(file).st_ino), fsync(file)))
    for owner, name in ((os, "rename"), (os, "replace"), (atomic, "_exchange")):
        monkeypatch.setattr(owner, name, renaming(getattr(owner, name)))
    (save_folder if kind == "folder" else save_file)(target)
    created = target.relative_to(tmp_path).parents[:-1]  # on the disk once their parents are
    expected = [target, *target.rglob("*"), *(tmp_path / folder.parent for folder in created)]
    assert {path.stat().st_ino for path in expected} <= before
    assert flushed == {target.parent.stat().st_ino}


def killed_at(
    monkeypatch: pytest.MonkeyPatch, call: int, save: Callable[[Path], None], target: Path
) -> int:
    """Call `save` in a forked process that is killed at its call-th step; return the exit status."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns about threads; the child starts none
        child = os.fork()
    if child == 0:
        try:
            die = partial(os.kill, os.getpid(), signal.SIGKILL)
            with failure_at(monkeypatch, call, die, after=False, calls=WRITES + REMOVALS):
                save(target)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("kind", ["folder", "file"])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_kill_at_any_step_leaves_old_or_new_and_the_next_save_cleans_up(
    tmp_path, monkeypatch, kind, situation
):
    save = save_folder if kind == "folder" else save_file
    new = NEW if kind == "folder" else NEW["a.txt"]
    exchanges = not situation.endswith("without-exchange")
    call = 0
    while True:
        call += 1
        parent = tmp_path / str(call)
        parent.mkdir()
        target = parent / "target"
        if situation != "new":
            write_tree_at(target) if kind == "folder" else target.write_bytes(OLD["a.txt"])
        old = content(target, kind)
        with monkeypatch.context() as patch:
            if not exchanges:
                without_exchange(patch)
            status = killed_at(patch, call, save, target)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        found = content(target, kind)
        if exchanges or kind == "file":
            assert found in (old, new), f"killed at call {call}"
        else:  # renamed; the next save renames it back
            assert found in (old, new, None), f"killed at call {call}"
        # Even a save that fails restores the folder that the killed one renamed.
        with monkeypatch.context() as patch:
            patch.setattr(atomic, "_put_in_place", lambda *_: raise_unexpected())
            with pytest.raises(InjectedError):
                save(target)
        assert content(target, kind) in (old, new)
        assert os.listdir(parent) == ([] if content(target, kind) is None else ["target"])
        save(target)
        assert content(target, kind) == new
        assert os.listdir(parent) == ["target"]
    assert content(target, kind) == new
    assert call > (6 if kind == "folder" else 4)


def refuse_renames(monkeypatch: pytest.MonkeyPatch, times: int) -> list[float]:
    """Refuse the first renames like Windows, where another program has a file open; return the pauses."""
    original, pauses = os.replace, []
    refusals = iter(range(times))

    def replace(*paths: Path) -> None:
        if next(refusals, None) is not None:
            raise PermissionError(errno.EACCES, "Access is denied")
        original(*paths)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(time, "sleep", pauses.append)
    return pauses


@pytest.mark.parametrize("kind", ["folder", "file"])
@pytest.mark.parametrize("situation", ["new", "replace"])
def test_windows_repeats_a_rename_while_another_program_has_a_file_open(
    tmp_path, monkeypatch, kind, situation
):
    target = prepare(situation, tmp_path, kind, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "win32")
        pauses = refuse_renames(patch, 3)
        save_folder(target) if kind == "folder" else save_file(target)
    assert pauses == [0.01, 0.02, 0.04]
    assert content(target, kind) == (NEW if kind == "folder" else NEW["a.txt"])
    assert len(os.listdir(tmp_path)) == 1


@pytest.mark.parametrize(("platform", "seconds"), [("win32", 5.11), ("darwin", 0)])
def test_a_rename_that_stays_refused_is_an_error(tmp_path, monkeypatch, platform, seconds):
    target = tmp_path / "target"
    write_tree_at(target)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", platform)
        pauses = refuse_renames(patch, 100)
        with pytest.raises(RunFolderError, match=r"Cannot write .*target': Access is denied"):
            save_folder(target)
    assert sum(pauses) == pytest.approx(seconds)
    assert read_tree(target) == OLD
    assert os.listdir(tmp_path) == ["target"]


def test_a_folder_that_a_killed_process_renamed_is_renamed_back_without_locks(
    tmp_path, monkeypatch
):
    """Windows cannot lock a folder, so the temporary of a process that may be alive stays."""
    monkeypatch.setattr(atomic, "fcntl", None)
    target = tmp_path / "target"
    write_tree_at(tmp_path / ".target.tmp-000000000000-old")
    write_tree_at(tmp_path / ".target.tmp-000000000001")
    with pytest.raises(InjectedError), storage.atomic_folder(target, overwrite=True):
        raise_unexpected()
    assert read_tree(target) == OLD
    assert sorted(os.listdir(tmp_path)) == [".target.tmp-000000000001", "target"]


def test_temporaries_of_a_living_process_are_left_alone(tmp_path):
    target = tmp_path / "target"
    with storage.atomic_folder(target) as outer:
        (outer / "a.txt").write_bytes(b"outer")
        with storage.atomic_folder(target) as inner:
            assert outer.exists()
            assert outer != inner
            (inner / "a.txt").write_bytes(b"inner")
        (target / "a.txt").unlink()  # the outer save only replaces an empty folder
    assert read_tree(target) == {"a.txt": b"outer"}
    assert os.listdir(tmp_path) == ["target"]


@pytest.mark.parametrize(
    ("save", "create"), [(storage.atomic_file, "touch"), (storage.atomic_folder, "mkdir")]
)
def test_a_save_survives_another_that_begins_before_its_lock(tmp_path, monkeypatch, save, create):
    """A temporary without a lock counts as abandoned, so the other save removes it."""
    original = getattr(Path, create)
    others = []

    def beside_another(temporary: Path, **settings: Any) -> None:
        original(temporary, **settings)
        if others:
            return
        others.append(temporary)
        with save(tmp_path / "target"):
            assert not temporary.exists()

    monkeypatch.setattr(Path, create, beside_another)
    with save(tmp_path / "target") as temporary:
        assert temporary.exists()
    assert os.listdir(tmp_path) == ["target"]


def test_leftovers_of_any_target_are_removed(tmp_path):
    dead = "tmp-0123456789ab"
    write_tree_at(tmp_path / f".step-000137.{dead}")
    (tmp_path / f".a.json.{dead}").touch()
    write_tree_at(tmp_path / f".renamed.{dead}-old")
    (tmp_path / ".mine.tmp-0").touch()
    with storage.atomic_folder(tmp_path / "target") as alive:
        storage.remove_leftovers(tmp_path)
        assert sorted(os.listdir(tmp_path)) == [".mine.tmp-0", alive.name, "renamed"]
    assert read_tree(tmp_path / "renamed") == OLD


def test_neighbours_with_similar_names_are_left_alone(tmp_path):
    dead = "tmp-0123456789ab"
    names = (".target.tmp", ".target.tmp-backup", f".target2.{dead}", f"target.{dead}")
    for name in names:
        (tmp_path / name).mkdir()
    save_folder(tmp_path / "target")
    assert sorted(os.listdir(tmp_path)) == sorted([*names, "target"])


def test_an_existing_folder_needs_overwrite(tmp_path):
    write_tree(tmp_path, {"a.txt": b"mine"})
    with (
        pytest.raises(RunFolderError, match=r"already exists.*overwrite"),
        storage.atomic_folder(tmp_path),
    ):
        pytest.fail("the block must not run")
    assert read_tree(tmp_path) == {"a.txt": b"mine"}


def test_an_empty_folder_is_replaced(tmp_path):
    target = tmp_path / "target"
    target.mkdir(mode=0o750)
    with storage.atomic_folder(target) as temporary:
        write_tree(temporary, NEW)
    assert read_tree(target) == NEW
    assert target.stat().st_mode & 0o777 == 0o750


def test_a_private_file_stays_private(tmp_path):
    target = tmp_path / "predictions.jsonl"
    target.touch(0o600)
    with storage.atomic_file(target) as temporary:
        assert temporary.stat().st_mode & 0o777 == 0o600
    assert target.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("situation", ["replace", "replace-without-exchange"])
def test_a_file_that_appears_during_the_work_stays(tmp_path, monkeypatch, situation):
    """Two commands of hours may have the same output: neither result is lost."""
    target = tmp_path / "out.jsonl"
    if situation == "replace-without-exchange":
        without_exchange(monkeypatch)

    def rows(name: str):
        target.write_text("first")
        yield name

    for name in ("out-2.jsonl", "out-3.jsonl"):
        target.unlink(missing_ok=True)
        with pytest.raises(RunFolderError, match=rf"meantime, so the result is in .*{name}'"):
            storage.write_rows(target, rows(name), overwrite=False)
        assert target.read_text() == "first"
        assert json.loads((tmp_path / name).read_text()) == name
    assert len(list(tmp_path.iterdir())) == 3


def refusing(number: int) -> Callable[..., None]:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.EIO])
def test_a_file_system_that_keeps_its_modes(tmp_path, monkeypatch, number):
    """A mounted SMB share allows every write, but may refuse every chmod."""
    write_tree_at(tmp_path / "folder")
    (tmp_path / "file").touch()
    tensors = {"a": torch.arange(3)}

    def save_all() -> None:
        save_folder(tmp_path / "folder")
        save_file(tmp_path / "file")
        write_safetensors(tmp_path / "a.safetensors", tensors)

    monkeypatch.setattr(os, "chmod", refusing(number))
    if number == errno.EIO:  # a broken disk
        with pytest.raises(RunFolderError, match=os.strerror(number)):
            save_all()
        return
    save_all()
    assert read_tree(tmp_path / "folder") == NEW
    assert (tmp_path / "file").read_bytes() == NEW["a.txt"]
    assert torch.equal(read_safetensors(tmp_path / "a.safetensors")["a"], tensors["a"])


@pytest.mark.parametrize("kind", ["folder", "file"])
@pytest.mark.skipif(os.name == "nt", reason="Windows cannot flush a folder")
def test_a_file_system_that_cannot_flush_folders(tmp_path, monkeypatch, kind):
    fsync = os.fsync

    def fails_for_kind(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == (kind == "folder"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fails_for_kind)
    if kind == "file":
        with pytest.raises(RunFolderError, match=os.strerror(errno.EINVAL)):
            save_folder(tmp_path / "a")
        return
    save_folder(tmp_path / "a")
    save_file(tmp_path / "b")
    assert read_tree(tmp_path / "a") == NEW


def test_a_folder_that_fills_up_during_the_save_is_not_replaced(tmp_path):
    target = tmp_path / "target"

    def save_while_another_does() -> None:
        with storage.atomic_folder(target) as temporary:
            write_tree(temporary, NEW)
            write_tree_at(target)

    with pytest.raises(RunFolderError, match="already exists"):
        save_while_another_does()
    assert read_tree(target) == OLD
    assert os.listdir(tmp_path) == ["target"]


def test_a_new_folder_has_the_permissions_of_the_umask(tmp_path):
    mask = os.umask(0o027)
    try:
        save_folder(tmp_path / "target")
    finally:
        os.umask(mask)
    assert (tmp_path / "target").stat().st_mode & 0o777 == 0o750


def test_kinds_of_targets_are_not_confused(tmp_path):
    (tmp_path / "file").write_bytes(b"f")
    (tmp_path / "folder").mkdir()
    with (
        pytest.raises(RunFolderError, match="is a file"),
        storage.atomic_folder(tmp_path / "file", overwrite=True),
    ):
        pytest.fail("the block must not run")
    with (
        pytest.raises(RunFolderError, match="is a folder"),
        storage.atomic_file(tmp_path / "folder"),
    ):
        pytest.fail("the block must not run")
    with (
        pytest.raises(RunFolderError, match="not a folder"),
        storage.atomic_folder(tmp_path / "file" / "below"),
    ):
        pytest.fail("the block must not run")
    assert (tmp_path / "file").read_bytes() == b"f"


def test_a_link_keeps_pointing_at_the_folder_that_is_replaced(tmp_path):
    write_tree_at(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    save_folder(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert read_tree(tmp_path / "real") == NEW


def test_links_inside_an_overwritten_folder_are_not_followed(tmp_path):
    write_tree_at(tmp_path / "target")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_bytes(b"keep")
    (tmp_path / "target" / "link").symlink_to(tmp_path / "precious")
    save_folder(tmp_path / "target")
    assert (tmp_path / "precious" / "file").read_bytes() == b"keep"


def test_a_full_disk_is_recognised_in_an_error_of_safetensors(tmp_path):
    class LibraryError(Exception):  # like SafetensorError: neither an OSError nor caused by one
        pass

    with (
        pytest.raises(RunFolderError, match="disk full"),
        storage.atomic_folder(tmp_path / "target"),
    ):
        raise LibraryError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [39, 112])
def test_windows_has_other_numbers_of_a_full_disk(monkeypatch, number):
    error = RuntimeError(f"I/O error: There is not enough space on the disk. (os error {number})")
    assert not storage.is_disk_full(error)  # "directory not empty" and "host is down" on Linux
    monkeypatch.setattr(sys, "platform", "win32")
    assert storage.is_disk_full(error)


def test_other_errors_of_the_caller_are_not_converted(tmp_path):
    with pytest.raises(PermissionError, match="mine"), storage.atomic_folder(tmp_path / "target"):
        raise PermissionError("mine")
    assert os.listdir(tmp_path) == []


# --- JSON ----------------------------------------------------------------------------------------


def test_json_is_sorted_indented_and_ends_in_a_newline(tmp_path):
    storage.write_json(tmp_path / "x.json", {"b": [1, 2.5, None], "a": "é\n"})
    assert (
        tmp_path / "x.json"
    ).read_bytes() == '{\n  "a": "é\\n",\n  "b": [\n    1,\n    2.5,\n    null\n  ]\n}\n'.encode()
    assert storage.read_json(tmp_path / "x.json") == {"a": "é\n", "b": [1, 2.5, None]}


def test_nan_is_rejected_in_json(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        storage.write_json(tmp_path / "x.json", {"a": float("nan")})
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a": 1,\n  "b": }', "line 2, column 8"),
        (b'{"a": "\xff"}', "byte 7"),
        (b"", "line 1, column 1"),
        (b"[1, 2]", "holds a JSON list"),
        (b"null", "holds a JSON null"),
        (b'"text"', "holds a JSON string"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' is duplicated"),
        (b'{"a": 1, "b": {"c": 2, "c": 3}}', "the key 'c' is duplicated"),
        (b"[" * 100_000, "is nested more than 100 levels deep"),
        (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", "is nested more than 100 levels deep"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "a number has 10,000 digits; at most 100"),
        (b'{"a": 1e400}', "the number 1e400 is beyond the range"),
        (b'{"a": -1e400}', "the number -1e400 is beyond the range"),
    ],
)
def test_invalid_json_is_an_error_with_its_position(tmp_path, data, message):
    path = tmp_path / "broken.json"
    path.write_bytes(data)
    with pytest.raises(AdapterFileError, match=message) as caught:
        storage.read_json(path)
    assert "broken.json" in str(caught.value)


def test_json_that_is_missing_or_huge(tmp_path, monkeypatch):
    with pytest.raises(AdapterFileError, match="does not exist"):
        storage.read_json(tmp_path / "none.json")
    with pytest.raises(AdapterFileError, match="not a file but a folder"):
        storage.read_json(tmp_path)
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(AdapterFileError, match="not a file but a folder, pipe or device"):
        storage.read_json(tmp_path / "pipe.json")
    with pytest.raises(AdapterFileError, match="not a file but a folder, pipe or device"):
        storage.read_json("/dev/zero")
    monkeypatch.setattr(records, "_MAX_JSON_BYTES", 100)
    (tmp_path / "huge.json").write_text(json.dumps({"a": "x" * 200}))
    with pytest.raises(AdapterFileError, match="larger than"):
        storage.read_json(tmp_path / "huge.json")


def test_a_small_json_file_takes_little_memory(tmp_path):
    (tmp_path / "small.json").write_text('{"a": 1}')
    tracemalloc.start()
    storage.read_json(tmp_path / "small.json")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_duplicate_keys_are_found_in_linear_time(tmp_path):
    keys = [f'"{i}": 0' for i in range(20_000)]
    (tmp_path / "many.json").write_text("{" + ", ".join([*keys, keys[-1]]) + "}")
    began = time.process_time()
    with pytest.raises(AdapterFileError, match="the key '19999' is duplicated"):
        storage.read_json(tmp_path / "many.json")
    assert time.process_time() - began < 1


def test_integers_of_128_bits_are_read(tmp_path):  # the state of a random generator
    storage.write_json(tmp_path / "x.json", {"a": 2**128 - 1})
    assert storage.read_json(tmp_path / "x.json") == {"a": 2**128 - 1}


def test_a_record_round_trip(tmp_path):
    record = {"b": [1, 2.5, None], "a": {"text": "Schrödinger"}}
    storage.write_record(tmp_path / "record.json", record)
    assert storage.read_record(tmp_path / "record.json", RunFolderError) == record


def test_every_changed_bit_of_a_record_is_detected(tmp_path):
    path = tmp_path / "record.json"
    record = {"step": 6, "tokens": 1_000, "loss": 2.25}
    storage.write_record(path, record)
    whole = path.read_bytes()
    for position in range(len(whole) - 1):  # the last byte is a newline without meaning
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            with suppress(RunFolderError):  # no error: one whitespace character became another
                assert storage.read_record(path, RunFolderError) == record


def test_a_record_without_a_checksum_is_rejected(tmp_path):
    storage.write_json(tmp_path / "record.json", {"step": 6})
    with pytest.raises(RunFolderError, match="checksum"):
        storage.read_record(tmp_path / "record.json", RunFolderError)


def test_sha256(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert storage.sha256(tmp_path / "abc") == known


# --- locks ---------------------------------------------------------------------------------------


def test_a_locked_folder_is_an_error_that_names_the_holder(tmp_path):
    with storage.lock_folder(tmp_path / "run"):
        with (
            pytest.raises(RunFolderError, match=rf"in use by another run \(pid {os.getpid()}\)"),
            storage.lock_folder(tmp_path / "run"),
        ):
            pytest.fail("two runs in one folder")
        with storage.lock_folder(tmp_path / "other"):
            pass
    with storage.lock_folder(tmp_path / "run"):
        pass
    assert os.listdir(tmp_path / "run") == [storage.LOCK_NAME]


@pytest.mark.parametrize(
    ("holder", "note"),
    [
        ("12 node-7\n", r" \(pid 12 on node-7\)\. .*delete '.*\.lock'"),
        (f"12 {socket.gethostname()}\n", r" \(pid 12\)\. Wait .*folder\.$"),
        ("", r"run\. Wait .*folder\.$"),  # it ended before it wrote this
        (None, r"run\. Wait .*folder\.$"),
    ],
)
def test_the_holder_may_be_on_another_machine(tmp_path, holder, note):
    """Where the file system has no locks, filelock's file of a process that was killed there stays."""
    with storage.lock_folder(tmp_path):
        (tmp_path / storage.HOLDER_NAME).unlink()
        if holder is not None:
            (tmp_path / storage.HOLDER_NAME).write_text(holder)
        with pytest.raises(RunFolderError, match=note), storage.lock_folder(tmp_path):
            pytest.fail("two runs in one folder")


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """filelock before its fallback, where flock is not implemented."""

    def acquire(*_: Any, **__: Any) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with pytest.raises(RunFolderError, match="has no locks"), storage.lock_folder(tmp_path):
        pytest.fail("not locked")


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_the_lock_of_a_killed_process_is_free(tmp_path):
    child = textwrap.dedent(
        f"""
        import os, sys, time, types
        package = types.ModuleType("lorakit")
        package.__path__ = [{str(SOURCES / "lorakit")!r}]
        sys.modules["lorakit"] = package
        from lorakit import storage
        with storage.lock_folder({str(tmp_path)!r}):
            print("held", flush=True)
            time.sleep(60)
        """
    )
    with subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with (
            pytest.raises(RunFolderError, match=f"pid {process.pid}"),
            storage.lock_folder(tmp_path),
        ):
            pytest.fail("two runs in one folder")
        process.kill()
    with storage.lock_folder(tmp_path):
        pass


def test_a_lock_in_an_invalid_location(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with (
        pytest.raises(RunFolderError, match="Cannot create the folder"),
        storage.lock_folder(tmp_path / "file"),
    ):
        pytest.fail("no folder to lock")


# --- errors of the operating system --------------------------------------------------------------


def refuse(*_: Any, **__: Any) -> Any:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: path.symlink_to("nowhere"), "is a broken symbolic link"),
        (lambda path: path.write_bytes(b"caf\xe9"), "not UTF-8 text: byte 3 is 0xe9"),
    ],
    ids=["missing", "a folder", "a link to nowhere", "another encoding"],
)
def test_read_errors_name_the_path(tmp_path, make, reason):
    path = tmp_path / "notes.txt"
    make(path)
    with (
        pytest.raises(DataError, match=rf"notes\.txt.*{reason}"),
        storage.reading(path, DataError),
    ):
        path.read_text(encoding="utf-8")


def test_permission_errors_name_the_path(tmp_path, monkeypatch):
    path = tmp_path / "notes.txt"
    monkeypatch.setattr(Path, "read_text", refuse)
    monkeypatch.setattr(Path, "write_text", refuse)
    with (
        pytest.raises(DataError, match=r"notes\.txt.*Permission denied"),
        storage.reading(path, DataError),
    ):
        path.read_text(encoding="utf-8")
    with (
        pytest.raises(RunFolderError, match=r"notes\.txt.*Permission denied"),
        storage.writing(path),
    ):
        path.write_text("", encoding="utf-8")


# --- checks before long work ---------------------------------------------------------------------


@pytest.mark.parametrize("check", [storage.require_free_file, storage.require_free_folder])
def test_a_writable_target_returns_its_real_path(tmp_path, check):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    assert check(tmp_path / "link" / "a" / "b") == tmp_path / "folder" / "a" / "b"
    assert not list((tmp_path / "folder").iterdir())


@pytest.mark.parametrize("check", [storage.require_free_file, storage.require_free_folder])
@pytest.mark.parametrize(
    ("name", "reason"),
    [("file/below", "is a file"), ("a\0b", "null"), ("x" * 300, "too long")],
    ids=["below a file", "a null byte", "a long name"],
)
def test_an_unwritable_target_is_an_immediate_error(tmp_path, check, name, reason):
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match=reason):
        check(tmp_path / name, overwrite=True)


@pytest.mark.parametrize("check", [storage.require_free_file, storage.require_free_folder])
def test_a_read_only_folder(tmp_path, check, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(RunFolderError, match="no permission to write to"):
        check(tmp_path / "new")


def test_an_existing_file_or_folder_needs_overwrite(tmp_path):
    (tmp_path / "file").touch()
    write_tree(tmp_path, OLD)
    with pytest.raises(RunFolderError, match=r"already exists.*overwrite"):
        storage.require_free_file(tmp_path / "file")
    with pytest.raises(RunFolderError, match=r"already exists.*overwrite"):
        storage.require_free_folder(tmp_path / "sub")
    assert storage.require_free_file(tmp_path / "file", overwrite=True)
    assert storage.require_free_folder(tmp_path / "sub", overwrite=True)


def test_a_mount_point_is_refused_before_the_work(tmp_path, monkeypatch):
    """A rename onto it would fail, after the work, as the volume of a container does."""
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    file.touch()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) in (folder, file))
    save = storage.atomic_folder(folder)
    for check in (
        lambda: storage.require_free_file(file, overwrite=True),
        lambda: storage.require_replaceable(folder, "mine", written=[], marks=[]),
        save.__enter__,
    ):
        with pytest.raises(RunFolderError, match=r"is a mount point.*Choose a path inside"):
            check()
    assert storage.require_free_folder(folder) == folder  # a run writes its files in place
    save_folder(folder / "sub")


OF_FILE_MANAGERS = [".DS_Store", "._model.bin", "Thumbs.db", "desktop.ini", "sub/.DS_Store"]


@pytest.mark.parametrize("name", OF_FILE_MANAGERS)
def test_files_of_file_managers_are_overwritten(tmp_path, name):
    """Finder and Explorer add them to a folder that the user looks at, also during a training."""
    target = tmp_path / "target"
    write_tree_at(target)
    (target / name).write_bytes(b"\x00\x05\x16\x07\x00\x02")  # as macOS writes ._model.bin
    storage.require_replaceable(target, "mine", written=OLD, marks=["a.txt"])
    (target / "thesis.tex").touch()
    with pytest.raises(RunFolderError, match=r"not mine, .*: thesis\.tex\. Choose"):
        storage.require_replaceable(target, "mine", written=OLD, marks=["a.txt"])


@pytest.mark.parametrize("name", OF_FILE_MANAGERS[:4])
def test_a_folder_with_files_of_a_file_manager_alone_is_free(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x00\x05\x16\x07\x00\x02")  # as macOS writes ._model.bin
    assert storage.require_free_folder(tmp_path) == tmp_path
    storage.require_replaceable(tmp_path, "mine", written=[], marks=["a.txt"])
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()  # of the user
    with pytest.raises(RunFolderError, match="already exists"):
        storage.require_free_folder(tmp_path)


def test_a_file_of_the_user_whose_name_macos_uses_too_is_kept(tmp_path):
    (tmp_path / "._notes").write_text("mine")
    with pytest.raises(RunFolderError, match="already exists"):
        storage.require_free_folder(tmp_path)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("real/sub/b.txt", True),
        ("real/sub", True),
        ("real", False),
        ("real/a.txt", False),
        ("real/subordinate", False),
        ("real/sub/missing", False),
        ("a\0b", False),
        ("link/sub/b.txt", True),
        ("REAL/sub/b.txt", True),
    ],
)
def test_what_is_within_a_folder(tmp_path, monkeypatch, path, expected):
    """Two spellings of one folder are equal, although `realpath` keeps both."""
    write_tree_at(tmp_path / "real")
    (tmp_path / "real" / "subordinate").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "REAL").symlink_to("real")
    real = os.path.realpath
    monkeypatch.setattr(
        os.path, "realpath", lambda path: path if "REAL" in str(path) else real(path)
    )
    for name in ("real", "link", "REAL"):
        assert storage.is_within(tmp_path / path, tmp_path / name / "sub") is expected
        assert not storage.is_within(tmp_path / path, tmp_path / name / "missing")


def test_a_link_in_place_of_a_folder_contains_nothing(tmp_path):
    """Deleting it spares the target."""
    write_tree_at(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    assert not storage.is_within(tmp_path / "link" / "a.txt", tmp_path / "link")


def test_only_a_regular_file_is_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(RunFolderError, match="is a folder"):
        storage.require_free_file(tmp_path / "folder", overwrite=True)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(RunFolderError, match="is a device"):
            storage.require_free_file(tmp_path / "pipe", overwrite=True)
