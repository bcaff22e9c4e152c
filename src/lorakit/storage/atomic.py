"""Files and folders that are there whole or not at all.

A save writes beside its target and renames at the end, so that a crash, a full disk or a killed
process leaves the old content or the new one. Everything is flushed to the disk before the rename:
after a power cut a rename can otherwise survive the data it points to.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lorakit.errors import RunFolderError
from lorakit.storage.refusals import full_disk_explained, writing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_SET_ASIDE = "-old"
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
    target = require_free_folder(path, overwrite=overwrite)
    with full_disk_explained(target), _parents_made(target), _temporary(target) as temporary:
        with writing(target):
            temporary.mkdir()
        with _claimed(temporary):
            yield temporary
            with writing(target):
                if target.is_dir():
                    shutil.copymode(target, temporary)
                _sync_tree(temporary)
                require_free_folder(target, overwrite=overwrite)
                _put_in_place(temporary, target)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield the path of an empty temporary file that replaces `path` when the block ends normally.

    On any exception `path` keeps its old content and nothing is left behind.

    Raises:
        RunFolderError: `path` is a folder or a device, or cannot be written.
    """
    target = require_free_file(path, overwrite=True)
    with full_disk_explained(target), _parents_made(target), _temporary(target) as temporary:
        with writing(target):
            temporary.touch(exist_ok=False)
        with _claimed(temporary):
            yield temporary
            with writing(target):
                _sync(temporary)
                _put_in_place(temporary, target)


def require_free_folder(path: str | Path, *, overwrite: bool = False) -> Path:
    """Refuse, before long work, what `atomic_folder` would refuse after it; return the real path.

    Raises:
        RunFolderError: As for `atomic_folder`.
    """
    target = _writable(path)
    with writing(target):
        if target.exists() and not target.is_dir():
            raise RunFolderError(f"'{target}' is a file, and a folder was to be written there.")
        if target.is_dir() and not overwrite and any(target.iterdir()):
            raise RunFolderError(
                f"'{target}' already exists. Choose another folder, or say overwrite to replace it."
            )
    return target


def require_free_file(path: str | Path, *, overwrite: bool = False) -> Path:
    """Refuse, before long work, a path where no file may be written after it; return the real path.

    Raises:
        RunFolderError: A folder or a device is there, or a file and `overwrite` is false; or the path
            cannot be written.
    """
    target = _writable(path)
    with writing(target):
        if target.exists() and not target.is_file():
            kind = "a folder" if target.is_dir() else "a device"
            raise RunFolderError(f"'{target}' is {kind}, and a file was to be written there.")
        if target.exists() and not overwrite:
            raise RunFolderError(
                f"'{target}' already exists. Choose another file, or say overwrite to replace it."
            )
    return target


def _writable(path: str | Path) -> Path:
    """The real path, if this process may write there."""
    try:
        target = Path(os.path.realpath(path))
    except ValueError as error:  # a null byte
        raise RunFolderError(f"{str(path)!r} is no path: {error}.") from None
    with writing(target):
        above = next((parent for parent in target.parents if parent.exists()), target)
        if not above.is_dir():
            raise RunFolderError(f"Cannot write '{target}': '{above}' is a file, not a folder.")
        if not os.access(above, os.W_OK | os.X_OK):
            raise RunFolderError(f"Cannot write '{target}': '{above}' may not be written to.")
    return target


# --- the steps of a save -------------------------------------------------------------------------


@contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """A fresh name beside the target; whatever is there when the block ends is removed."""
    with writing(target):
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


@contextmanager
def _parents_made(target: Path) -> Iterator[None]:
    """Make the folders above the target; those made here go again if the save fails."""
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
