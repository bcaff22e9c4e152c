"""Exclusive locks on folders."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock

from lorakit.errors import RunFolderError

LOCK_NAME = ".lock"
"""The lock file that `lock_folder` creates in the folder."""
HOLDER_NAME = ".lock-holder"


@contextmanager
def lock_folder(path: str | Path) -> Iterator[None]:
    """Lock a folder for this process, without waiting. Create the folder if it is missing.

    The system releases the lock when the process ends, also if it is killed.

    Raises:
        RunFolderError: Another run holds the lock, or the folder cannot be created.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(
            f"Cannot create the folder '{folder}': {error.strerror}. Choose another folder."
        ) from error
    lock = filelock.FileLock(folder / LOCK_NAME, is_singleton=False)
    holder = folder / HOLDER_NAME
    try:
        lock.acquire(blocking=False)
    # filelock raises RuntimeError if this thread holds the lock through another object.
    except (filelock.Timeout, RuntimeError) as error:
        raise RunFolderError(
            f"'{folder}' is in use by another run{_pid_note(holder)}. "
            "Wait for it to end, or choose another folder."
        ) from error
    except OSError as error:
        raise RunFolderError(
            f"Cannot lock the folder '{folder}': {error.strerror}. Choose another folder."
        ) from error
    try:
        with suppress(OSError):  # only used in the message above
            holder.write_text(f"{os.getpid()}\n", encoding="utf-8")
        yield
    finally:
        with suppress(OSError):
            holder.unlink()
        lock.release()


def _pid_note(holder: Path) -> str:
    with suppress(OSError, ValueError):
        return f" (pid {int(holder.read_text(encoding='utf-8'))})"
    return ""
