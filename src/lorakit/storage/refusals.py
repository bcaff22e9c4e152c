"""What the system refuses while a file is read or written, as errors of lorakit's."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorakit.errors import AdapterFileError, LorakitError, RunFolderError

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def reading(path: str | Path, error: type[LorakitError]) -> Iterator[None]:
    """Say what cannot be read, and why, where the system refuses `path` or something in it.

    Raises:
        error: It is missing, locked, a folder, on a broken disk, or in another encoding than UTF-8.
    """
    try:
        yield
    except OSError as refusal:
        if _is_disk_full(refusal):  # what is read is written elsewhere at the same time
            raise
        name = refusal.filename or path
        if not isinstance(refusal, FileNotFoundError):
            reason = (
                f"cannot be read: {refusal.strerror or refusal}. Check its kind and its rights."
            )
        elif os.path.islink(name):
            reason = "is a link that leads nowhere. Check the path."
        else:
            reason = "does not exist. Check the path."
        raise error(f"'{name}' {reason}") from refusal
    except UnicodeDecodeError as refusal:
        raise error(
            f"'{path}' is not UTF-8 text: byte {refusal.start} is 0x{refusal.object[refusal.start]:02x}. It is of "
            "another kind, damaged, or in another encoding; save it as UTF-8."
        ) from refusal
    except ValueError as refusal:
        if "null byte" not in str(refusal):
            raise
        raise error(f"{str(path)!r} is no path: {refusal}.") from refusal


def regular_file(path: Path, error: type[LorakitError] = AdapterFileError) -> Path:
    """Return `path` if a file is there, itself or behind a link (the hub's cache is made of links).

    Raises:
        error: Nothing is there, or a folder, pipe or device, which might never end.
    """
    with reading(path, error):
        mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise error(f"'{path}' is not a file, and one was expected there.")
    return path


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Say that `path` cannot be written, and why, where the system refuses it.

    Raises:
        RunFolderError: The disk is full, the folder is read-only, something else has the name.
    """
    try:
        with full_disk_explained(Path(path)):
            yield
    except OSError as refusal:
        reason = refusal.strerror or refusal
        raise RunFolderError(f"Cannot write '{path}': {reason}.") from refusal


@contextmanager
def full_disk_explained(path: Path) -> Iterator[None]:
    """Say so where the disk is full, whoever found it out; any other error passes.

    Raises:
        RunFolderError: The disk is full.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, LorakitError) or not _is_disk_full(error):
            raise
        raise RunFolderError(
            f"disk full while writing '{path}'; nothing was changed there. "
            f"Free some space in '{path.parent}' or choose a folder on another disk."
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
