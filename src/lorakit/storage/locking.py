"""A folder held by one process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock

from lorakit.errors import RunFolderError

LOCK_NAME = ".lock"
"""The file inside a folder whose lock `lock_folder` takes."""
HOLDER_NAME = ".lock-holder"


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


def _pid_note(holder: Path) -> str:
    with suppress(OSError, ValueError):
        return f" (pid {int(holder.read_text(encoding='utf-8'))})"
    return ""
