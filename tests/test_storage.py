"""Outputs, records and locks. `test_kills.py` has the saves that fail or are killed."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lorakit import storage
from lorakit.errors import AdapterFileError, ConfigurationError, DataError, RunFolderError
from lorakit.storage.tensors import read_safetensors

OLD = {"a.txt": b"old a", "sub/b.txt": b"old b"}
NEW = {"a.txt": b"new a, and longer"}


def write_tree(folder: Path, content: dict[str, bytes]) -> Path:
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def read_tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def save_folder(target: Path, *, overwrite: bool = True) -> None:
    with storage.atomic_folder(target, overwrite=overwrite) as temporary:
        write_tree(temporary, NEW)


# --- saves ---------------------------------------------------------------------------------------


def test_an_exception_in_the_block_passes_and_leaves_the_old_folder(tmp_path: Path) -> None:
    write_tree(tmp_path / "target", OLD)

    def save() -> None:
        with storage.atomic_folder(tmp_path / "target", overwrite=True) as temporary:
            write_tree(temporary, NEW)
            raise PermissionError("mine")

    with pytest.raises(PermissionError, match="mine"):
        save()
    assert read_tree(tmp_path / "target") == OLD
    assert os.listdir(tmp_path) == ["target"]


def test_temporaries_of_running_saves_and_other_names_are_left_alone(tmp_path: Path) -> None:
    names = {".target.tmp", ".target.tmp-backup", ".mine.tmp-0", "target.tmp-0123456789ab"}
    for name in names:
        (tmp_path / name).mkdir()
    with storage.atomic_folder(tmp_path / "other") as alive:
        storage.remove_leftovers(tmp_path)
        save_folder(tmp_path / "target")
        assert set(os.listdir(tmp_path)) == {*names, alive.name, "target"}


def test_leftovers_of_any_target_are_removed_and_old_folders_renamed_back(tmp_path: Path) -> None:
    write_tree(tmp_path / ".step-000137.tmp-0123456789ab", OLD)
    (tmp_path / ".a.json.tmp-0123456789ab").touch()
    write_tree(tmp_path / ".renamed.old-0123456789ab", OLD)
    write_tree(tmp_path / ".replaced.old-0123456789ab", OLD)
    write_tree(tmp_path / "replaced", NEW)
    storage.remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["renamed", "replaced"]
    assert read_tree(tmp_path / "renamed") == OLD
    assert read_tree(tmp_path / "replaced") == NEW


def test_a_deleted_folder_is_gone(tmp_path: Path) -> None:
    storage.delete_folder(write_tree(tmp_path / "target", OLD))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("mode", [0o600, 0o444])
def test_a_private_file_stays_private(tmp_path: Path, mode: int) -> None:
    target = tmp_path / "predictions.jsonl"
    target.touch(mode)
    storage.write_rows(target, [1])
    assert target.stat().st_mode & 0o777 == mode | 0o200


def test_a_private_folder_stays_private_and_a_new_one_has_the_mode_of_the_umask(
    tmp_path: Path,
) -> None:
    (tmp_path / "private").mkdir(mode=0o700)
    mask = os.umask(0o027)
    try:
        save_folder(tmp_path / "private")
        save_folder(tmp_path / "new")
    finally:
        os.umask(mask)
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_target_that_appears_during_the_work_stays(tmp_path: Path, kind: str) -> None:
    """Two commands of hours may have the same output: neither result is lost."""
    target = tmp_path / "out.jsonl"

    def rows() -> Any:
        target.write_text("first")
        yield "second"

    def save() -> None:
        if kind == "file":
            storage.write_rows(target, rows(), overwrite=False)
        else:
            with storage.atomic_folder(target) as temporary:
                (temporary / "a.txt").write_text("second")
                write_tree(target, OLD)

    with pytest.raises(RunFolderError, match=r"meantime, so the result is in .*out-2\.jsonl'"):
        save()
    assert target.read_text() == "first" if kind == "file" else read_tree(target) == OLD
    other = tmp_path / "out-2.jsonl"
    assert "second" in (other if kind == "file" else other / "a.txt").read_text()
    assert sorted(os.listdir(tmp_path)) == ["out-2.jsonl", "out.jsonl"]


def test_links_are_kept_and_those_inside_an_overwritten_folder_are_not_followed(
    tmp_path: Path,
) -> None:
    write_tree(tmp_path / "real", OLD)
    write_tree(tmp_path / "precious", {"file": b"keep"})
    (tmp_path / "real" / "link").symlink_to(tmp_path / "precious")
    (tmp_path / "link").symlink_to("real")
    save_folder(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert read_tree(tmp_path / "real") == NEW
    assert read_tree(tmp_path / "precious") == {"file": b"keep"}


# --- checks before long work ---------------------------------------------------------------------

CHECKS = [storage.require_free_file, storage.require_free_folder]


@pytest.mark.parametrize("check", CHECKS)
def test_a_writable_target_returns_its_real_path(tmp_path: Path, check: Callable) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    assert check(tmp_path / "link" / "a" / "b") == tmp_path / "folder" / "a" / "b"
    assert not list((tmp_path / "folder").iterdir())


REFUSED_OUTPUTS = {
    "an existing file": (storage.require_free_file, "file", False, "already exists.*overwrite"),
    "an existing folder": (storage.require_free_folder, "folder", False, "already exists.*overwr"),
    "a folder, not a file": (storage.require_free_file, "folder", True, "is a folder, expected"),
    "a file, not a folder": (storage.require_free_folder, "file", True, "is a file, expected"),
    "a device": (storage.require_free_file, "/dev/null", True, "is a device, expected a file"),
    "below a file": (storage.require_free_folder, "file/below", True, "is a file, not a folder"),
    "a long name": (storage.require_free_file, "x" * 300, True, "too long"),
}


@pytest.mark.parametrize(
    ("check", "name", "overwrite", "reason"), REFUSED_OUTPUTS.values(), ids=REFUSED_OUTPUTS
)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, check: Callable, name: str, overwrite: bool, reason: str
) -> None:
    write_tree(tmp_path, {"file": b"f", "folder/mine": b"mine"})
    with pytest.raises(RunFolderError, match=reason):
        check(tmp_path / name, overwrite=overwrite)
    assert read_tree(tmp_path) == {"file": b"f", "folder/mine": b"mine"}


@pytest.mark.parametrize("check", CHECKS)
def test_a_read_only_folder(
    tmp_path: Path, check: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(RunFolderError, match="no permission to write to"):
        check(tmp_path / "new")


def test_a_mount_point_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rename onto it would fail, after the work. A run writes its files in place."""
    with pytest.raises(RunFolderError, match=r"is a mount point.*Choose a path inside"):
        storage.require_replaceable("/proc", "mine", written=[], marks=[])
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path)
    with (
        pytest.raises(RunFolderError, match=r"is a mount point.*Choose a path inside"),
        storage.atomic_folder(tmp_path, overwrite=True),
    ):
        pytest.fail("the work has begun")


FILES_OF_FILE_MANAGERS = [".DS_Store", "Thumbs.db", "desktop.ini"]


@pytest.mark.parametrize("name", FILES_OF_FILE_MANAGERS)
def test_files_of_file_managers_are_overwritten_and_those_of_users_are_not(
    tmp_path: Path, name: str
) -> None:
    """Finder and Explorer add them to a folder that the user looks at, also during a training."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / name).touch()
    assert storage.require_free_folder(tmp_path / "empty") == tmp_path / "empty"
    target = write_tree(tmp_path / "target", {**OLD, name: b"", f"sub/{name}": b""})
    storage.require_replaceable(target, "mine", written=OLD, marks=["a.txt"])
    (target / "thesis.tex").touch()
    with pytest.raises(RunFolderError, match=r"not mine, .*: thesis\.tex\. Choose"):
        storage.require_replaceable(target, "mine", written=OLD, marks=["a.txt"])


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        *[("real/sub/b.txt", True), ("real/sub", True), ("link/sub/b.txt", True)],
        *[("real", False), ("real/a.txt", False), ("real/subordinate", False)],
        *[("real/sub/missing", False), ("a\0b", False)],
    ],
)
@pytest.mark.parametrize("name", ["real", "link"])
def test_what_is_within_a_folder(tmp_path: Path, path: str, name: str, expected: bool) -> None:
    write_tree(tmp_path / "real", {**OLD, "subordinate/c": b""})
    (tmp_path / "link").symlink_to("real")
    assert storage.is_within(tmp_path / path, tmp_path / name / "sub") is expected
    assert not storage.is_within(tmp_path / path, tmp_path / name / "missing")


# --- files that cannot be read -------------------------------------------------------------------

READERS = {
    "json": lambda path: storage.read_json(path, DataError),
    "yaml": lambda path: storage.read_yaml(path, DataError),
    "tensors": lambda path: read_safetensors(path, DataError),
    "mapped": lambda path: read_safetensors(path, DataError, mapped=True),
}
UNREADABLE = {
    "missing": (None, "does not exist"),
    "a folder": (Path.mkdir, "cannot be read|directory|not a file but a folder"),
    "a broken link": (lambda path: path.symlink_to("nowhere"), "does not exist|No such file"),
    "no text": (lambda path: path.write_bytes(b"caf\xe9 \xff\0\0\0\0"), "UTF-8|safetensors"),
}


@pytest.mark.parametrize(("make", "reason"), UNREADABLE.values(), ids=UNREADABLE)
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_an_unreadable_file_is_an_error_with_its_name(
    tmp_path: Path, read: Callable, make: Callable | None, reason: str
) -> None:
    path = tmp_path / "notes"
    if make is not None:
        make(path)
    with pytest.raises(DataError, match=rf"notes.*({reason})"):
        read(path)


def test_a_write_that_is_refused_names_the_path() -> None:
    with (
        pytest.raises(RunFolderError, match=r"Cannot write 'notes': Permission denied"),
        storage.writing("notes"),
    ):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


INVALID_JSON = {
    "syntax": (b'{"a": 1,\n  "b": }', "not JSON: .*line 2 column 8"),
    "empty": (b"", "not JSON: .*line 1 column 1"),
    "a list": (b"[1, 2]", "does not hold a JSON object"),
    "null": (b"null", "does not hold a JSON object"),
    "a duplicate key": (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' is duplicated"),
    "a duplicate key below": (b'{"a": 1, "b": {"c": 2, "c": 3}}', "the key 'c' is duplicated"),
    "depth": (b"[" * 100_000, "not JSON: maximum recursion depth"),
    "digits": (b'{"a": ' + b"9" * 10_000 + b"}", "not JSON: .*digits"),
}


@pytest.mark.parametrize(("data", "message"), INVALID_JSON.values(), ids=INVALID_JSON)
def test_invalid_json_is_an_error_with_its_position(
    tmp_path: Path, data: bytes, message: str
) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(data)
    with pytest.raises(AdapterFileError, match=rf"broken\.json.*{message}"):
        storage.read_json(path)


INVALID_YAML = {
    "syntax": ("base:\n  name: chat\n  - x\n", 'in ".*run.yaml", line 3, column 3'),
    "a duplicate key": ("a: 1\nb: 2\na: 3", "'a' occurs twice"),
    "a duplicate key below": ("a: [{b: 1, b: 2}]", "'b' occurs twice"),
    "a list as key": ("? [a, b]\n: c", "unhashable key"),
    "python": ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
    "a control character": ("a: b\x1bc", "special characters are not allowed"),
    "two documents": ("a: 1\n---\nb: 2", "expected a single document"),
    "an unknown alias": ("a: *b", "undefined alias"),
}


@pytest.mark.parametrize(("text", "problem"), INVALID_YAML.values(), ids=INVALID_YAML)
def test_invalid_yaml_is_an_error_with_its_line(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=rf"is not valid YAML: .*{problem}"):
        storage.read_yaml(path, ConfigurationError)


def test_an_error_in_a_secret_file_does_not_quote_it(tmp_path: Path) -> None:
    (tmp_path / "keys.yaml").write_text("ok: 1\nkey: [hunter2")
    with pytest.raises(ConfigurationError, match=r"line 2\. Correct it") as caught:
        storage.read_yaml(tmp_path / "keys.yaml", ConfigurationError, secret=True)
    assert "hunter2" not in str(caught.value)


# --- records -------------------------------------------------------------------------------------


def test_json_is_sorted_indented_and_ends_in_a_newline(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None, 2**128 - 1], "a": "é\n"}
    storage.write_json(tmp_path / "x.json", value)
    lines = (tmp_path / "x.json").read_text("utf-8").split("\n")
    assert lines[:3] == ["{", '  "a": "é\\n",', '  "b": [']
    assert lines[-2:] == ["}", ""]
    assert storage.read_json(tmp_path / "x.json") == value


def test_nan_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        storage.write_json(tmp_path / "x.json", {"a": float("nan")})
    assert storage.finite({"a": [float("nan"), 1.5], "b": float("inf")}) == {
        "a": [None, 1.5],
        "b": None,
    }


def test_every_changed_bit_of_a_record_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    record = {"step": 6, "name": "Schrödinger", "loss": 2.25}
    storage.write_record(path, record)
    assert storage.read_record(path, RunFolderError) == record
    whole = path.read_bytes()
    for bit in range(8 * (len(whole) - 1)):  # the last byte is a newline without meaning
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with suppress(RunFolderError):  # no error: one whitespace character became another
            assert storage.read_record(path, RunFolderError) == record


def test_a_record_without_a_checksum_is_rejected(tmp_path: Path) -> None:
    storage.write_json(tmp_path / "record.json", {"step": 6})
    with pytest.raises(RunFolderError, match="checksum"):
        storage.read_record(tmp_path / "record.json", RunFolderError)


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert storage.sha256(tmp_path / "abc") == known


def test_rows_are_lines_of_json(tmp_path: Path) -> None:
    storage.write_rows(tmp_path / "a.jsonl", [{"a": "é"}, [1]])
    assert [*map(json.loads, (tmp_path / "a.jsonl").read_text("utf-8").splitlines())] == [
        {"a": "é"},
        [1],
    ]


# --- locks ---------------------------------------------------------------------------------------


def test_a_locked_folder_is_an_error_until_the_lock_is_released(tmp_path: Path) -> None:
    with storage.lock_folder(tmp_path / "run"):
        with (
            pytest.raises(RunFolderError, match=r"in use by another run\. .* delete '.*\.lock'"),
            storage.lock_folder(tmp_path / "run"),
        ):
            pytest.fail("two runs in one folder")
        with storage.lock_folder(tmp_path / "other"):
            pass
    with storage.lock_folder(tmp_path / "run"):
        pass


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    child = (
        "import sys, time; from lorakit import storage\n"
        "with storage.lock_folder(sys.argv[1]):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", child, str(tmp_path)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(RunFolderError, match="in use"), storage.lock_folder(tmp_path):
            pytest.fail("two runs in one folder")
        process.kill()
    with storage.lock_folder(tmp_path):
        pass


def test_a_lock_in_an_invalid_location(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with (
        pytest.raises(RunFolderError, match=r"Cannot write .*file'"),
        storage.lock_folder(tmp_path / "file"),
    ):
        pytest.fail("no folder to lock")
