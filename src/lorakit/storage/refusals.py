"""Errors of the operating system during file access, converted to errors of lorakit."""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorakit.errors import AdapterFileError, LorakitError, RunFolderError, is_out_of_memory

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_DISK_FULL_ON_WINDOWS = (112, 39)
"""ERROR_DISK_FULL, which Python converts to ENOSPC but Rust does not, and ERROR_HANDLE_DISK_FULL."""


@contextmanager
def reading(path: str | Path, error: type[LorakitError]) -> Iterator[None]:
    """Convert errors from reading `path`, or a file in it, to `error` with the path and the reason.

    Those of full memory pass unchanged.

    Raises:
        error: The file is missing, locked, a folder, on a broken disk, or not UTF-8.
    """
    try:
        yield
    except OSError as failure:
        if is_disk_full(failure) or is_out_of_memory(failure):  # the disk: a write inside the block
            raise
        name = failure.filename or path
        if not isinstance(failure, FileNotFoundError):
            reason = (
                f"cannot be read: {failure.strerror or failure}. Check its type and permissions."
            )
        elif os.path.islink(name):
            reason = "is a broken symbolic link. Check the path."
        else:
            reason = "does not exist. Check the path."
        raise error(f"'{name}' {reason}") from failure
    except UnicodeDecodeError as failure:
        raise error(
            f"'{path}' is not UTF-8 text: byte {failure.start} is 0x{failure.object[failure.start]:02x}. The file is "
            "not text, damaged or in another encoding; save it as UTF-8."
        ) from failure
    except ValueError as failure:
        if "null byte" not in str(failure):
            raise
        raise error(f"{str(path)!r} is not a valid path: {failure}.") from failure


def regular_file(path: Path, error: type[LorakitError] = AdapterFileError) -> Path:
    """Return `path` if it is a file or a link to one (the hub's cache consists of links).

    Raises:
        error: `path` is missing, or a folder, pipe or device; reading a pipe might never end.
    """
    with reading(path, error):
        mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise error(f"'{path}' is not a file but a folder, pipe or device. Check the path.")
    return path


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Convert errors from writing `path` to a RunFolderError with the path and the reason.

    Raises:
        RunFolderError: The disk is full, the folder is read-only, or the name is in use.
    """
    try:
        with full_disk_explained(Path(path)):
            yield
    except OSError as failure:
        reason = failure.strerror or failure
        raise RunFolderError(f"Cannot write '{path}': {reason}.") from failure


@contextmanager
def full_disk_explained(path: Path) -> Iterator[None]:
    """Convert disk-full errors of any library to a RunFolderError; other errors pass unchanged.

    Raises:
        RunFolderError: The disk is full.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, LorakitError) or not is_disk_full(error):
            raise
        raise RunFolderError(
            f"disk full while writing '{path}'; nothing was changed there. "
            f"Free some space in '{path.parent}' or choose a folder on another disk."
        ) from error


def is_disk_full(error: BaseException | None) -> bool:
    """Return whether an error, or one that caused it, is of a full disk."""
    in_rust = _DISK_FULL_ON_WINDOWS if sys.platform == "win32" else _DISK_FULL
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            return True
        # safetensors is written in Rust: its own exception quotes the system's message.
        if any(f"(os error {number})" in str(error) for number in in_rust):
            return True
        error = error.__cause__ or error.__context__
    return False
