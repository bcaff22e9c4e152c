"""Atomic writes of files and folders, and locks on folders.

A save writes to a temporary sibling of its target, flushes it to the disk, and renames it. After a crash, a full disk
or a kill at any instant the target has either its old or its new content.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from itertools import count
from pathlib import Path

import filelock

from lorakit.errors import RunFolderError
from lorakit.storage.paths import (
    disk_full_explained,
    is_used,
    require_free_file,
    require_free_folder,
    require_no_mount,
    writing,
)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK_NAME = ".lock"
"""The file in a folder that `lock_folder` locks."""

_SIBLING = re.compile(r"\.(?P<target>.+)\.(?P<kind>tmp|old)-[0-9a-f]{12}", re.DOTALL)
"""Names of temporaries (tmp), and of old folders during their replacement (old)."""
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
"""Constants of renameat2(2)."""


def atomic_folder(path: str | Path, *, overwrite: bool = False) -> AbstractContextManager[Path]:
    """Return a context of an empty temporary folder that replaces `path` when it ends without an exception.

    On any exception `path` keeps its old content. Linux swaps an old folder with the new one in a single step. Other
    systems rename it first; if the process is killed between the two steps, the next save there renames it back.

    Raises:
        RunFolderError: `path` holds files and `overwrite` is false, is not a folder, is a mount point, or cannot be
            written; or another process has written it meanwhile, and the result has a name beside it.
    """
    target = require_free_folder(path, overwrite=overwrite)
    require_no_mount(target)
    return _save(target, Path.mkdir, overwrite)


def atomic_file(path: str | Path, *, overwrite: bool = True) -> AbstractContextManager[Path]:
    """Return a context of an empty temporary file that replaces `path` when it ends without an exception.

    On any exception `path` keeps its old content. The new file has the mode of the old one: a private file stays
    private. Before long work, call `require_free_file`.

    Raises:
        RunFolderError: `path` is a folder, a device or a mount point, or cannot be written. Or it is a file and
            `overwrite` is false: another process has written it meanwhile, and the result has a name beside it.
    """
    return _save(require_free_file(path, overwrite=True), Path.touch, overwrite)


@contextmanager
def _save(target: Path, create: Callable[[Path], object], overwrite: bool) -> Iterator[Path]:
    """Create a file or folder beside the target, with its mode; yield its path, then put it in the target's place."""
    temporary = _sibling(target, "tmp")
    with disk_full_explained(target):
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(target.parent, target.name)
            create(temporary)
        lock = _lock(temporary)
        try:
            with suppress(OSError):  # a mounted share has modes of its own
                temporary.chmod(stat.S_IMODE(target.stat().st_mode) | stat.S_IWUSR)
            yield temporary
            with writing(target):
                for written in (*temporary.rglob("*"), temporary):
                    _sync(written)
                _put_in_place(temporary, target, is_free=overwrite or not is_used(target))
        finally:
            _remove(temporary)
            if lock is not None:
                os.close(lock)
            with suppress(RunFolderError):  # restores the old folder if the second rename failed
                remove_leftovers(target.parent, target.name)


def _sibling(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}-{secrets.token_hex(6)}")


def _put_in_place(temporary: Path, target: Path, *, is_free: bool) -> None:
    """Rename the temporary to the target, or to a free name beside it so that neither result is lost."""
    numbered = (target.with_stem(f"{target.stem}-{n}") for n in count(2))
    place = target if is_free else next(path for path in numbered if not path.exists())
    if not place.is_dir():
        os.replace(temporary, place)
    elif not _exchange(temporary, place):
        old = _sibling(place, "old")
        os.replace(place, old)
        os.replace(temporary, place)
        _remove(old)
    _sync(place.parent)
    if not is_free:
        raise RunFolderError(
            f"'{target}' was written by another process in the meantime, so the result is in '{place}'."
        )


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in a single step; return False if the system or the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    if not hasattr(libc, "renameat2"):
        return False
    names = _AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other)
    return libc.renameat2(*names, _RENAME_EXCHANGE) == 0


def _sync(path: Path) -> None:
    """Flush to the disk: after a power cut a rename can otherwise survive the data it points to."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder
    try:
        descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # Some file systems cannot flush folders, such as the shared folders of VirtualBox.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def _lock(temporary: Path) -> int | None:
    """Lock a temporary until the returned descriptor is closed; the kernel closes those of a killed process.

    Returns None if another save holds the lock, or the system or the file system has no such locks.
    """
    if fcntl is None:
        return None
    with suppress(OSError):
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except OSError:
            os.close(descriptor)
    return None


def remove_leftovers(folder: Path, target: str | None = None) -> None:
    """Remove what killed saves left in `folder`: those of the name `target`, or all.

    An old folder that a killed save has not replaced yet is renamed back. Temporaries of running saves stay, and on
    Windows, which cannot lock a folder, all temporaries.

    Raises:
        RunFolderError: `folder` cannot be read, or an old folder cannot be renamed back.
    """
    with writing(folder):
        for name in os.listdir(folder):
            match = _SIBLING.fullmatch(name)
            if match is None or target not in (None, match["target"]):
                continue
            leftover, place = folder / name, folder / match["target"]
            if match["kind"] == "old" and not place.exists():
                os.replace(leftover, place)
            elif match["kind"] == "old":
                _remove(leftover)
            elif (lock := _lock(leftover)) is not None:
                _remove(leftover)
                os.close(lock)


def delete_folder(path: Path) -> None:
    """Delete a folder. It is renamed first, so that a kill or an error leaves no half of it under its name.

    `remove_leftovers` removes what is left.

    Raises:
        OSError: It cannot be renamed, or not be deleted.
    """
    temporary = _sibling(path, "tmp")
    os.replace(path, temporary)
    shutil.rmtree(temporary)


def _remove(path: Path) -> None:
    """Remove a file or folder as far as possible; the next save tries again."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


@contextmanager
def lock_folder(path: str | Path) -> Iterator[None]:
    """Lock a folder for this process, without waiting. Create the folder if it is missing.

    The system releases the lock when the process ends, also if it is killed.

    Raises:
        RunFolderError: Another run holds the lock, or the folder cannot be created or locked.
    """
    file = Path(path) / LOCK_NAME
    lock = filelock.FileLock(file, is_singleton=False)
    with writing(path):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        # filelock raises RuntimeError if this thread holds the lock through another object.
        except (filelock.Timeout, RuntimeError) as error:
            # Without locks in the file system, the lock file of a process that was killed on another machine stays.
            raise RunFolderError(
                f"'{path}' is in use by another run. Wait for it to end, or choose another folder. If no such run "
                f"exists on any machine, delete '{file}'."
            ) from error
    try:
        yield
    finally:
        lock.release()
