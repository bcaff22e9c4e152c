"""Folders in the user's cache: converted and unpacked models."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import filelock

from lorakit.errors import BaseModelError


def cache_folder() -> Path:
    """Return the folder for converted models: ``$LORAKIT_CACHE``, else the user's cache folder."""
    import platformdirs

    return Path(os.environ.get("LORAKIT_CACHE") or platformdirs.user_cache_dir("lorakit"))


def cached(folder: Path, names: Iterable[str], make: Callable[[], None]) -> Path:
    """Return `folder`, after `make` has created it if one of its files is missing. Other processes wait for it.

    One lock serves the whole cache, so that failed conversions leave no lock files. Removing a lock file instead would
    be a race: a process that waits for the removed file does not exclude one that creates it again.

    Raises:
        BaseModelError: The cache is not writable.
    """
    if is_complete(folder, names):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder.parent / ".lock", is_singleton=False).acquire()
    except OSError as error:
        raise BaseModelError(
            f"Cannot write the cache folder '{folder.parent}' ({error.strerror}). Set "
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
