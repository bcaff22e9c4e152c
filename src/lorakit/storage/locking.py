"""Exclusive locks on folders."""

from __future__ import annotations

import os
import socket
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
        RunFolderError: Another run holds the lock, or the folder cannot be created or locked.
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
    # Of older versions of filelock; newer ones use a marker file.
    except NotImplementedError as error:
        raise RunFolderError(
            f"Cannot lock the folder '{folder}': its file system has no locks. Choose another folder."
        ) from error
    # filelock raises RuntimeError if this thread holds the lock through another object.
    except (filelock.Timeout, RuntimeError) as error:
        who, advice = _holder(folder)
        raise RunFolderError(
            f"'{folder}' is in use by another run{who}. "
            f"Wait for it to end, or choose another folder.{advice}"
        ) from error
    except OSError as error:
        raise RunFolderError(
            f"Cannot lock the folder '{folder}': {error.strerror}. Choose another folder."
        ) from error
    try:
        with suppress(OSError):  # only used in the message above
            holder.write_text(f"{os.getpid()} {socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        with suppress(OSError):
            holder.unlink()
        lock.release()


def _holder(folder: Path) -> tuple[str, str]:
    """Return the process that holds a lock, in words, and what to do if it runs on another machine."""
    with suppress(OSError, ValueError):
        pid, host = (folder / HOLDER_NAME).read_text(encoding="utf-8").split()
        if host == socket.gethostname():
            return f" (pid {pid})", ""
        # Without locks in the file system, the lock file of a process that was killed there stays.
        advice = f" If no such process runs there, delete '{folder / LOCK_NAME}'."
        return f" (pid {pid} on {host})", advice
    return "", ""
