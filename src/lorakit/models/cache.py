"""Folders in the user's cache: converted and unpacked models."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import filelock

from lorakit.errors import BaseModelError

_LOCKS = 64
"""Lock files in the cache folder, at most."""


def cache_folder() -> Path:
    """Return the folder for converted models: ``$LORAKIT_CACHE``, else the user's cache folder."""
    import platformdirs

    folder = os.environ.get("LORAKIT_CACHE") or platformdirs.user_cache_dir("lorakit")
    return Path(os.path.expanduser(folder))  # keeps the ~ of an unknown user


def cached(folder: Path, names: Iterable[str], make: Callable[[], None]) -> Path:
    """Return `folder`, after `make` has created it if one of its files is missing. Other processes wait for it.

    A fixed number of locks serves all folders, so that failed conversions do not leave ever more lock files. Folders
    with the same lock, which are rare, wait for each other. Removing a lock file would be a race: a process that waits
    for the removed file does not exclude one that creates it again.

    Raises:
        BaseModelError: The cache is not writable.
    """
    if is_complete(folder, names):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        number = zlib.crc32(folder.name.encode()) % _LOCKS
        lock = filelock.FileLock(folder.parent / f".lock-{number}", is_singleton=False).acquire()
    # Older versions of filelock raise NotImplementedError on a file system without locks.
    except (OSError, NotImplementedError) as error:
        reason = error.strerror if isinstance(error, OSError) else "its file system has no locks"
        raise BaseModelError(
            f"Cannot write the cache folder '{folder.parent}' ({reason}). Set "
            "LORAKIT_CACHE to a writable folder."
        ) from error
    with lock:
        if not is_complete(folder, names):  # another process may have created it
            make()
    return folder


def is_complete(folder: Path, names: Iterable[str]) -> bool:
    """Return whether a cached folder has all of these files."""
    # The folder appears atomically, but a cache cleaner may have deleted files from it.
    return all((folder / name).is_file() for name in names)
