"""Atomic writes of files and folders.

A save writes to a temporary sibling of its target and renames it at the end. After a crash, a full
disk or a killed process the target has either its old or its new content. Everything is flushed to
the disk before the rename: after a power cut a rename can otherwise survive the data it points to.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path

from lorakit.errors import RunFolderError
from lorakit.storage.outputs import require_free_file, require_free_folder, require_no_mount
from lorakit.storage.refusals import full_disk_explained, writing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_OLD_SUFFIX = "-old"
_TEMPORARY = re.compile(r"\.(.+)\.tmp-[0-9a-f]{12}(-old)?", re.DOTALL)
"""Names of temporaries (`_temporary_name`), and of their targets."""
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_PAUSES = tuple(0.01 * 2**n for n in range(9))
"""Seconds between the tries of a rename on Windows, 5 in total."""


@contextmanager
def atomic_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder that replaces `path` when the block ends without an exception.

    On any exception `path` keeps its old content and the temporary folder is removed. An existing
    folder is swapped with the new one in a single step if the system supports it (Linux). Otherwise
    the old folder is renamed first; if the process is killed between the two steps, the next call
    renames it back. Every call also removes the temporary folders of killed processes, but not on
    Windows, which cannot lock a folder.

    Raises:
        RunFolderError: `path` holds files and `overwrite` is false, is not a folder, is a mount
            point, or cannot be written.
    """
    target = require_free_folder(path, overwrite=overwrite)
    require_no_mount(target)
    with (
        full_disk_explained(target),
        _created_parents(target),
        _temporary(target, Path.mkdir) as temporary,
    ):
        yield temporary
        with writing(target):
            if target.is_dir():
                copy_mode(target, temporary)
            _sync_tree(temporary)
            require_free_folder(target, overwrite=overwrite)
            _put_in_place(temporary, target)


@contextmanager
def atomic_file(path: str | Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Yield the path of an empty temporary file that replaces `path` when the block ends normally.

    On any exception `path` keeps its old content and the temporary file is removed. The new file has
    the mode of the old one: a private file stays private. If `path` exists at the end and `overwrite`
    is false, the new file gets a name beside it, and an error names it.

    Raises:
        RunFolderError: `path` is a folder or a device, cannot be written, or is a file and
            `overwrite` is false.
    """
    target = require_free_file(path, overwrite=True)
    create = partial(Path.touch, mode=0o600 if target.exists() else 0o666, exist_ok=False)
    with (
        full_disk_explained(target),
        _created_parents(target),
        _temporary(target, create) as temporary,
    ):
        yield temporary
        with writing(target):
            if target.exists():
                copy_mode(target, temporary)
            _sync(temporary)
            place = target if overwrite or not target.exists() else _free_name(target)
            _put_in_place(temporary, place)
        if place != target:
            raise RunFolderError(
                f"'{target}' was written by another process in the meantime, so the result is in '{place}'."
            )


def _free_name(path: Path) -> Path:
    """Return a path beside a file that is not in use: NAME-2.jsonl for NAME.jsonl."""
    numbered = (path.with_stem(f"{path.stem}-{n}") for n in count(2))
    return next(other for other in numbered if not other.exists())


def copy_mode(source: Path, target: Path) -> None:
    """Give a file or folder the permissions of another, unless the file system refuses it, as a mounted share may."""
    try:
        shutil.copymode(source, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.ENOSYS):
            raise


@contextmanager
def _temporary(target: Path, create: Callable[[Path], object]) -> Iterator[Path]:
    """Create a file or folder beside the target, yield its path, and remove it at the end."""
    with writing(target):
        _remove_leftovers(target.parent, target.name)
        temporary, lock = _created(target, create)
    try:
        yield temporary
    finally:
        _remove(temporary)
        old = temporary.with_name(temporary.name + _OLD_SUFFIX)
        if old.exists():
            with suppress(OSError):
                _restore_or_remove(old, target)
        if lock is not None:
            os.close(lock)


def delete_folder(path: Path) -> None:
    """Delete a folder. It is renamed first, so that a kill or an error leaves no half of it under its name.

    `remove_leftovers` removes what is left.

    Raises:
        OSError: It cannot be renamed, or not be deleted.
    """
    temporary = path.with_name(_temporary_name(path))
    _rename(path, temporary)
    shutil.rmtree(temporary)


def _temporary_name(target: Path) -> str:
    return f".{target.name}.tmp-{secrets.token_hex(6)}"


def _created(target: Path, create: Callable[[Path], object]) -> tuple[Path, int | None]:
    """Return a new temporary and the descriptor of its lock, which the kernel releases with the process.

    A save of another process that sees the temporary before its lock takes it for abandoned; then create another.
    """
    while True:
        temporary = target.with_name(_temporary_name(target))
        try:
            create(temporary)
            if fcntl is None:
                return temporary, None
            with suppress(FileNotFoundError):
                lock = os.open(temporary, os.O_RDONLY)
                with suppress(OSError):  # without file locks, leftovers are never removed
                    fcntl.flock(lock, fcntl.LOCK_EX)
                if temporary.exists():
                    return temporary, lock
                os.close(lock)
        except BaseException:
            _remove(temporary)
            raise


def _lock_of_abandoned(path: Path) -> int | None:
    """Lock a temporary whose process has ended, and return the lock's descriptor; None for those of others."""
    if fcntl is None:
        return None
    try:
        lock = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lock
    except OSError:
        os.close(lock)
        return None


def remove_leftovers(folder: Path) -> None:
    """Remove what saves of killed processes left in `folder`, whatever their targets.

    A save does this for its own target alone, and a run may never save a checkpoint of the same step again.

    Raises:
        RunFolderError: `folder` cannot be read, or an old folder cannot be renamed back.
    """
    with writing(folder):
        _remove_leftovers(folder)


def _remove_leftovers(folder: Path, of: str | None = None) -> None:
    """Remove the temporaries of killed processes; only those of the target named `of`, if it is given."""
    for name in sorted(os.listdir(folder)):
        match = _TEMPORARY.fullmatch(name)
        if match is None or of not in (None, match[1]):
            continue
        leftover, target, is_old = folder / name, folder / match[1], match[2] is not None
        if fcntl is None and is_old and not target.exists():
            # If its process still runs, the save there fails, but no content is lost.
            _rename(leftover, target)
            continue
        lock = _lock_of_abandoned(leftover)
        if lock is None:
            continue
        try:
            if is_old:
                _restore_or_remove(leftover, target)
            else:
                _remove(leftover)
        finally:
            os.close(lock)


def _restore_or_remove(old: Path, target: Path) -> None:
    """Remove the old folder, or rename it back if the new one has not replaced it yet."""
    if target.exists():
        _remove(old)
    else:
        _rename(old, target)


def _remove(path: Path) -> None:
    # Best effort: the next save retries.
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _sync_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            _sync(Path(root, name))
        _sync(Path(root))


def _sync(path: Path) -> None:
    is_folder = path.is_dir()
    if is_folder and os.name == "nt":
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems, such as shared folders of VirtualBox, have no flush of folders.
        if not is_folder or error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _put_in_place(temporary: Path, target: Path) -> None:
    """Rename the temporary to the target; the old content moves to the temporary's name."""
    undo = _swap(temporary, target)
    try:
        _sync(target.parent)
    except BaseException:
        # The save fails, so restore the old content.
        with suppress(OSError):
            undo()
        raise


def _rename(path: Path, new: Path) -> None:
    """Rename a file or folder. On Windows, repeat it for some seconds while the system refuses it.

    Windows refuses to rename a folder with an open file, and virus scanners and indexers open each new file.
    """
    for pause in _PAUSES if sys.platform == "win32" else ():
        with suppress(PermissionError):
            os.replace(path, new)
            return
        time.sleep(pause)
    os.replace(path, new)


def _swap(temporary: Path, target: Path) -> Callable[[], object]:
    """Replace the target by the temporary; return a function that reverts it."""
    if not target.exists():
        _rename(temporary, target)
        return lambda: _rename(target, temporary)
    if _exchange(temporary, target):
        return lambda: _exchange(temporary, target)
    if not target.is_dir():
        _rename(temporary, target)
        return lambda: None
    old = temporary.with_name(temporary.name + _OLD_SUFFIX)
    _rename(target, old)
    _rename(temporary, target)

    def undo() -> None:
        _rename(target, temporary)
        _rename(old, target)

    return undo


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in a single step; return False if the system or file system does not support it."""
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    renameat2 = getattr(libc, "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


@contextmanager
def _created_parents(target: Path) -> Iterator[None]:
    """Create the parent folders of the target, and remove those again if the save fails."""
    missing = [parent for parent in target.parents if not parent.exists()]
    try:
        with writing(target):
            for parent in reversed(missing):
                parent.mkdir(exist_ok=True)
                _sync(parent.parent)
        yield
    except BaseException:
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()
        raise
