"""Files and folders that are there whole or not at all.

A save writes beside its target and renames at the end, so that a crash, a full disk or a killed
process leaves the old content or the new one. Everything is flushed to the disk before the rename:
after a power cut a rename can otherwise survive the data it points to.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import hashlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock

from lorakit.errors import AdapterFileError, LorakitError, RunFolderError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK_NAME = ".lock"
"""The file inside a folder whose lock `lock_folder` takes."""
HOLDER_NAME = ".lock-holder"
_SET_ASIDE = "-old"
_CHUNK = 1 << 20
_MAX_JSON_BYTES = 1 << 28
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def atomic_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes `path` when the block ends without an exception.

    On any exception `path` keeps its old content and nothing is left behind. Where the system can
    (Linux), an existing folder is swapped with the new one in a single step; elsewhere it is
    renamed aside first, and a process killed between the two steps leaves it aside until the next
    call puts it back. That call also removes what killed processes have left behind.

    Raises:
        RunFolderError: `path` holds files and `overwrite` is false, is no folder, or cannot be
            written.
    """
    target = Path(os.path.realpath(path))
    _check_folder(target, overwrite)
    with errors_explained(target), _parents_made(target), _temporary(target) as temporary:
        with _our_step(target):
            temporary.mkdir()
        with _claimed(temporary):
            yield temporary
            with _our_step(target):
                if target.is_dir():
                    shutil.copymode(target, temporary)
                _sync_tree(temporary)
                _check_folder(target, overwrite)
                _put_in_place(temporary, target)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield the path of an empty temporary file that replaces `path` when the block ends normally.

    On any exception `path` keeps its old content and nothing is left behind.

    Raises:
        RunFolderError: `path` is a folder or cannot be written.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise RunFolderError(f"'{target}' is a folder, and a file was to be written there.")
    with errors_explained(target), _parents_made(target), _temporary(target) as temporary:
        with _our_step(target):
            temporary.touch(exist_ok=False)
        with _claimed(temporary):
            yield temporary
            with _our_step(target):
                _sync(temporary)
                _put_in_place(temporary, target)


def write_json(path: str | Path, obj: Any) -> None:
    """Write `obj` as UTF-8 JSON: sorted keys, two spaces, a newline at the end.

    Raises:
        ValueError, TypeError: `obj` holds NaN, an infinity or something JSON has no form for.
    """
    text = json.dumps(obj, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    Path(path).write_bytes(f"{text}\n".encode())


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a file whose content is one JSON object.

    Raises:
        AdapterFileError: The file cannot be read, is not JSON (with the position), or no object.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_JSON_BYTES + 1)
    except OSError as error:
        raise AdapterFileError(f"Cannot read '{path}': {error.strerror or error}.") from error
    if len(data) > _MAX_JSON_BYTES:
        raise AdapterFileError(
            f"'{path}' is larger than {_MAX_JSON_BYTES >> 20} MiB, too large for JSON settings."
        )
    try:
        found = json.loads(
            data.decode(), parse_constant=_refuse_constant, object_pairs_hook=_unique
        )
    except UnicodeDecodeError as error:
        raise AdapterFileError(
            f"'{path}' is not JSON: byte {error.start} is no UTF-8 text. "
            "The file is damaged or of another kind."
        ) from error
    except json.JSONDecodeError as error:
        raise AdapterFileError(
            f"'{path}' is not JSON: line {error.lineno}, column {error.colno}: {error.msg}."
        ) from error
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"'{path}' is not JSON as expected: {error}.") from error
    if not isinstance(found, dict):
        raise AdapterFileError(
            f"'{path}' holds a JSON {_json_name(found)}; an object, {{...}}, was expected."
        )
    return found


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def lock_folder(path: str | Path) -> Iterator[None]:
    """Hold a folder for this process alone, without waiting; the folder is made if need be.

    The lock goes with the process, however it ends.

    Raises:
        RunFolderError: Another run holds the folder, or it cannot be made.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"Cannot make the folder '{folder}': {error.strerror}.") from error
    lock = filelock.FileLock(folder / LOCK_NAME, is_singleton=False)
    holder = folder / HOLDER_NAME
    try:
        lock.acquire(blocking=False)
    # filelock answers RuntimeError where this very thread holds the lock through another object.
    except (filelock.Timeout, RuntimeError) as error:
        raise RunFolderError(
            f"'{folder}' is in use by another run{_pid_note(holder)}. "
            "Wait for it to end, or choose another folder."
        ) from error
    except OSError as error:
        raise RunFolderError(f"Cannot lock the folder '{folder}': {error.strerror}.") from error
    try:
        with suppress(OSError):  # only a hint for the message above
            holder.write_text(f"{os.getpid()}\n", encoding="utf-8")
        yield
    finally:
        with suppress(OSError):
            holder.unlink()
        lock.release()


# --- the steps of a save -------------------------------------------------------------------------


def _check_folder(target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise RunFolderError(f"'{target}' is a file, and a folder was to be written there.")
    if target.is_dir() and not overwrite and any(target.iterdir()):
        raise RunFolderError(
            f"'{target}' already exists. Choose another folder, or say overwrite to replace it."
        )


@contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """A fresh name beside the target; whatever is there when the block ends is removed."""
    with _our_step(target):
        _remove_leftovers(target)
    temporary = target.with_name(f"{_temporary_prefix(target)}{secrets.token_hex(6)}")
    try:
        yield temporary
    finally:
        _remove(temporary)
        aside = temporary.with_name(temporary.name + _SET_ASIDE)
        if aside.exists():
            with suppress(OSError):
                _settle_aside(aside, target)


def _temporary_prefix(target: Path) -> str:
    return f".{target.name}.tmp-"


@contextmanager
def _claimed(temporary: Path) -> Iterator[None]:
    """Hold a lock on the temporary; the kernel drops it with the process: what is left is junk."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks: then leftovers stay
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _abandoned(path: Path) -> bool:
    """Whether the process that made this temporary is gone."""
    if fcntl is None:
        return False
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _remove_leftovers(target: Path) -> None:
    for name in sorted(os.listdir(target.parent)):
        if not name.startswith(_temporary_prefix(target)):
            continue
        leftover = target.with_name(name)
        if not _abandoned(leftover):
            continue
        if name.endswith(_SET_ASIDE):
            _settle_aside(leftover, target)
        else:
            _remove(leftover)


def _settle_aside(aside: Path, target: Path) -> None:
    """A folder set aside is the target's only copy until the new one has taken its place."""
    if target.exists():
        _remove(aside)
    else:
        os.rename(aside, target)


def _remove(path: Path) -> None:
    # Best effort: what cannot be removed now is a leftover for the next save.
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _sync_tree(folder: Path) -> None:
    for where, _, files in os.walk(folder, topdown=False):
        for name in files:
            _sync(Path(where, name))
        _sync(Path(where))


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(temporary: Path, target: Path) -> None:
    """Let the temporary take the target's name; what it replaces ends up at the temporary's."""
    undo = _swap(temporary, target)
    try:
        _sync(target.parent)
    except BaseException:
        # The caller will see a failed save, so the old content goes back.
        with suppress(OSError):
            undo()
        raise


def _swap(temporary: Path, target: Path) -> Callable[[], object]:
    """Make the change visible; return what takes it back."""
    if not target.exists():
        os.rename(temporary, target)
        return lambda: os.rename(target, temporary)
    if _exchange(temporary, target):
        return lambda: _exchange(temporary, target)
    if not target.is_dir():
        os.replace(temporary, target)
        return lambda: None
    aside = temporary.with_name(temporary.name + _SET_ASIDE)
    os.rename(target, aside)
    os.rename(temporary, target)

    def undo() -> None:
        os.rename(target, temporary)
        os.rename(aside, target)

    return undo


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in a single step; False where the system or the file system cannot."""
    renameat2 = getattr(_libc(), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


@functools.cache
def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


# --- errors --------------------------------------------------------------------------------------


@contextmanager
def _our_step(target: Path) -> Iterator[None]:
    """Explain what the system refuses us; an error of the caller's own code is not ours."""
    try:
        yield
    except OSError as error:
        if _is_disk_full(error):
            raise
        raise RunFolderError(f"Cannot write '{target}': {error.strerror or error}.") from error


@contextmanager
def errors_explained(target: Path) -> Iterator[None]:
    """Turn a full disk into an error that says so and what to do.

    Raises:
        RunFolderError: The disk is full.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, LorakitError) or not _is_disk_full(error):
            raise
        raise RunFolderError(
            f"disk full while writing '{target}'; nothing was changed there. "
            f"Free some space in '{target.parent}' or choose a folder on another disk."
        ) from error


def _is_disk_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            return True
        # safetensors writes in Rust and raises an error of its own with the system's text in it.
        if any(f"(os error {number})" in str(error) for number in _DISK_FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def _parents_made(target: Path) -> Iterator[None]:
    """Make the folders above the target; those made here go again if the save fails."""
    missing = [parent for parent in target.parents if not parent.exists()]
    try:
        with _our_step(target):
            for parent in reversed(missing):
                parent.mkdir(exist_ok=True)
                _sync(parent.parent)
        yield
    except BaseException:
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()
        raise


def _pid_note(holder: Path) -> str:
    with suppress(OSError, ValueError):
        return f" (pid {int(holder.read_text(encoding='utf-8'))})"
    return ""


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"'{twice}' stands twice in one object")
    return found


def _json_name(value: Any) -> str:
    names = {list: "list", str: "string", bool: "true or false", int: "number", float: "number"}
    return names.get(type(value), "null")
