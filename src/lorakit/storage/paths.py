"""Paths of files to read and of outputs to write: checks before long work, and errors that name the path."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path

from lorakit.errors import AdapterFileError, LorakitError, RunFolderError, is_out_of_memory

_OF_FILE_MANAGERS = (".DS_Store", "Thumbs.db", "desktop.ini")
"""Files that macOS and Windows add to the folders that a user looks at. Overwriting them loses nothing."""
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

# --- errors of the operating system ------------------------------------------------------------------------------


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
        reason = f"cannot be read: {failure.strerror or failure}. Check its type and permissions."
        if isinstance(failure, FileNotFoundError):
            reason = "does not exist. Check the path."
        raise error(f"'{failure.filename or path}' {reason}") from failure
    except UnicodeDecodeError as failure:
        raise error(
            f"'{path}' is not UTF-8 text: {failure}. The file is not text, damaged or in another encoding; save it as "
            "UTF-8."
        ) from failure


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
        with disk_full_explained(Path(path)):
            yield
    except OSError as failure:
        reason = failure.strerror or failure
        raise RunFolderError(f"Cannot write '{path}': {reason}.") from failure


@contextmanager
def disk_full_explained(path: Path) -> Iterator[None]:
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
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            return True
        # safetensors is written in Rust: its own exception quotes the system's message.
        if any(f"(os error {number})" in str(error) for number in _DISK_FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


# --- outputs -----------------------------------------------------------------------------------------------------


def require_free_folder(path: str | Path, *, overwrite: bool = False) -> Path:
    """Return the real path of an output folder that can be written. Call this before long work.

    Raises:
        RunFolderError: As for `atomic_folder`; but a mount point passes, for files that are written in place.
    """
    return _free(path, overwrite, "folder", os.path.isdir, "Choose another folder")


def require_free_file(path: str | Path, *, overwrite: bool = False, option: str = "") -> Path:
    """Return the real path of an output file that can be written. Call this before long work.

    `option` is the command-line option that names the file, if it is not the usual --output.

    Raises:
        RunFolderError: `path` is a folder, a device or a mount point, is a file and `overwrite` is
            false, or cannot be written.
    """
    choice = f"Choose another file{f' ({option} FILE)' if option else ''}"
    target = _free(path, overwrite, "file", os.path.isfile, choice)
    require_no_mount(target)
    return target


_KINDS = (("folder", os.path.isdir), ("file", os.path.isfile))


def _free(
    path: str | Path, overwrite: bool, kind: str, fits: Callable[[Path], bool], choice: str
) -> Path:
    target = Path(os.path.realpath(path))
    with writing(target):
        above = next(parent for parent in (*target.parents, target) if parent.exists())
        if not above.is_dir():
            problem = f"'{above}' is a file, not a folder"
        elif not os.access(above, os.W_OK | os.X_OK):
            problem = f"no permission to write to '{above}'"
        elif target.exists() and not fits(target):
            found = next((k for k, is_kind in _KINDS if is_kind(target)), "device")
            problem = f"it is a {found}, expected a {kind}"
        elif is_used(target) and not overwrite:
            raise RunFolderError(
                f"'{target}' already exists. {choice}, or pass overwrite=True (--overwrite on the command line) to "
                "replace it."
            )
        else:
            return target
    raise RunFolderError(f"Cannot write '{target}': {problem}. Choose another path.")


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
        names = (p.relative_to(folder).as_posix() for p in files if not _is_disposable(p))
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


def is_used(target: Path) -> bool:
    """Return whether a file exists, or a folder with more in it than the files of a file manager."""
    return target.exists() and not (target.is_dir() and all(map(_is_disposable, target.iterdir())))


def visible_names(folder: Path) -> list[str]:
    """Return the sorted names in a folder, without hidden ones and the files of file managers."""
    names = (path.name for path in folder.iterdir() if not _is_disposable(path))
    return sorted(name for name in names if not name.startswith("."))


def _is_disposable(path: Path) -> bool:
    return path.name in _OF_FILE_MANAGERS and path.is_file()


def is_within(path: str | Path, folder: Path) -> bool:
    """Return whether `path` exists and is `folder` or a file or folder in it.

    Compares what the file system finds, not names: macOS and Windows ignore the case of letters.
    """
    if not (os.path.exists(path) and os.path.exists(folder)):
        return False
    place = Path(os.path.realpath(path))
    return any(above.samefile(folder) for above in (place, *place.parents))
