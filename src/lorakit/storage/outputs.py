"""Check an output path before long work: whether it can be written, and what overwriting it would delete."""

from __future__ import annotations

import os
from collections.abc import Collection
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path

from lorakit.errors import RunFolderError
from lorakit.storage.refusals import reading, writing

_OF_FILE_MANAGERS = (".DS_Store", "Thumbs.db", "desktop.ini")
"""Files that macOS and Windows add to the folders that a user looks at."""
_APPLE_DOUBLE = b"\x00\x05\x16\x07"
"""Start of the files `._NAME` in which macOS keeps attributes of NAME on other disks."""


def require_free_folder(path: str | Path, *, overwrite: bool = False) -> Path:
    """Return the real path of an output folder that can be written. Call this before long work.

    Raises:
        RunFolderError: As for `atomic_folder`; but a mount point passes, for files that are written in place.
    """
    target = _writable(path)
    with writing(target):
        if target.exists() and not target.is_dir():
            raise RunFolderError(f"'{target}' is a file, expected a folder. Choose another path.")
        if target.is_dir() and not overwrite and not all(map(_is_disposable, target.iterdir())):
            raise RunFolderError(
                f"'{target}' already exists. Choose another folder, or pass overwrite=True (--overwrite on the command "
                "line) to replace it."
            )
    return target


def require_free_file(path: str | Path, *, overwrite: bool = False, option: str = "") -> Path:
    """Return the real path of an output file that can be written. Call this before long work.

    `option` is the command-line option that names the file, if it is not the usual --output.

    Raises:
        RunFolderError: `path` is a folder, a device or a mount point, is a file and `overwrite` is
            false, or cannot be written.
    """
    target = _writable(path)
    with writing(target):
        if target.exists() and not target.is_file():
            kind = "a folder" if target.is_dir() else "a device"
            raise RunFolderError(f"'{target}' is {kind}, expected a file. Choose another path.")
        if target.exists() and not overwrite:
            raise RunFolderError(
                f"'{target}' already exists. Choose another file{f' ({option} FILE)' if option else ''}, or pass "
                "overwrite=True (--overwrite on the command line) to replace it."
            )
    require_no_mount(target)
    return target


def require_replaceable(
    folder: str | Path, what: str, *, written: Collection[str], marks: Collection[str]
) -> None:
    """Refuse to overwrite a folder with files other than those that a save of this kind writes.

    Args:
        folder: The output folder; it may be missing or empty.
        what: Whose files a save writes, for the message ("an adapter's").
        written: Patterns of those files, relative to the folder. A star does not match a slash.
        marks: The folder must have one of these files.

    Raises:
        RunFolderError: The folder has other files, or none of `marks`, or is a mount point.
    """
    folder = Path(os.path.realpath(folder))
    require_no_mount(folder)
    if others := other_files(folder, written=written, marks=marks):
        raise RunFolderError(
            f"'{folder}' holds files that are not {what}, and overwriting would delete them: "
            f"{', '.join(others)}. Choose another folder."
        )


def other_files(folder: Path, *, written: Collection[str], marks: Collection[str]) -> list[str]:
    """Return up to three files of a folder that overwriting it would delete; see `require_replaceable`.

    Raises:
        RunFolderError: The folder cannot be read.
    """
    with reading(folder, RunFolderError):
        patterns = written if any((folder / mark).exists() for mark in marks) else ()
        files = (p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())
        names = (file.relative_to(folder).as_posix() for file in files if not _is_disposable(file))
        others = (
            name
            for name in names
            if not any(fnmatch(name, p) and name.count("/") == p.count("/") for p in patterns)
        )
        return sorted(islice(others, 3))  # the folder may have millions


def require_no_mount(target: Path) -> None:
    """Reject a mount point, such as a volume of a container: no rename can replace it."""
    if os.path.ismount(target):
        raise RunFolderError(
            f"'{target}' is a mount point, which cannot be replaced. Choose a path inside a mounted folder."
        )


def _is_disposable(path: Path) -> bool:
    """Return whether a file manager created the file, so that overwriting loses nothing."""
    if not path.is_file():
        return False
    if path.name.startswith("._"):
        with path.open("rb") as file:
            return file.read(len(_APPLE_DOUBLE)) == _APPLE_DOUBLE
    return path.name in _OF_FILE_MANAGERS


def visible_names(folder: Path) -> list[str]:
    """Return the sorted names in a folder, without hidden ones and the files of file managers."""
    entries = (entry for entry in folder.iterdir() if not entry.name.startswith("."))
    return sorted(entry.name for entry in entries if not _is_disposable(entry))


def is_within(path: str | Path, folder: Path) -> bool:
    """Return whether `path` exists and is `folder` or a file or folder in it.

    Compares what the file system finds, not names: macOS and Windows ignore the case of letters. A link in place of
    `folder` contains nothing, as deleting it spares its target.
    """
    if not (os.path.exists(path) and os.path.lexists(folder)):
        return False
    place, found = Path(os.path.realpath(path)), folder.lstat()
    return any(os.path.samestat(above.stat(), found) for above in (place, *place.parents))


def _writable(path: str | Path) -> Path:
    """Return the real path if this process has permission to write there."""
    try:
        target = Path(os.path.realpath(path))
    except ValueError as error:  # a null byte
        raise RunFolderError(f"{str(path)!r} is not a valid path: {error}.") from None
    with writing(target):
        above = next((parent for parent in target.parents if parent.exists()), target)
        if not above.is_dir():
            raise RunFolderError(
                f"Cannot write '{target}': '{above}' is a file, not a folder. Choose another path."
            )
        if not os.access(above, os.W_OK | os.X_OK):
            raise RunFolderError(
                f"Cannot write '{target}': no permission to write to '{above}'. Choose another path."
            )
    return target
