"""Adapters on disk: which files belong to one, whether they have changed, and the digest of their content.

A state is a few calls of `stat` and reads no file. A file that is written again has another state, because its time of
change is part of it. Such times have a resolution of some milliseconds, so a file is only read once it is older.
"""

from __future__ import annotations

import functools
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from lorakit import storage
from lorakit.adapters import formats
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.errors import AdapterFileError, LorakitError
from lorakit.file_names import (
    ADAPTER,
    ADAPTER_CONFIGS,
    ADAPTER_TENSORS,
    CHECKPOINTS,
    RESULT,
    STATE,
    TOKENIZER_FILES,
    WEIGHTS,
)
from lorakit.formatting import size
from lorakit.training.checkpoint import checkpoints_in
from lorakit.training.checkpoint_adapter import read_checkpoint
from lorakit.training.run_folder import adapter_of_run

_FILES = frozenset({*ADAPTER_CONFIGS, *ADAPTER_TENSORS, WEIGHTS, STATE})

_RESOLUTION = 20_000_000
"""Nanoseconds: two writes of a file that are further apart have different times."""

LONGEST_NAME = 200
"""Most characters of a public name."""
LARGEST_OTHER = 1 << 28
"""Most bytes of a file without tensors."""


class FileState(NamedTuple):
    """A file with what changes when it is written again. Times are in nanoseconds."""

    path: str
    inode: int
    size: int
    modified: int
    changed: int


State = tuple[FileState, ...]


@dataclass(frozen=True)
class Location:
    """Where the files of an adapter are now."""

    folder: str
    """The adapter folder. It describes the tensors and may have a tokenizer."""
    checkpoint: str | None = None
    """The checkpoint of a training run that has newer tensors; the folder then describes them."""

    @property
    def path(self) -> str:
        """The path to show to users."""
        return self.checkpoint or self.folder

    @property
    def has_tokenizer(self) -> bool:
        """Whether the folder has a tokenizer."""
        return formats.has_tokenizer(self.folder)

    def state(self) -> State:
        """Return the state of the files that determine the adapter.

        Raises:
            AdapterFileError: The folder cannot be read.
        """
        with storage.reading(self.path, AdapterFileError):
            files = sorted(_states(self.folder))
            if self.checkpoint:
                files += sorted(_states(self.checkpoint))
            return tuple(files)

    def read(self) -> StoredAdapter:
        """Read the adapter.

        Raises:
            AdapterFileError: It is damaged, incomplete or unsafe.
        """
        return read_checkpoint(self.checkpoint) if self.checkpoint else formats.read(self.folder)


@dataclass(frozen=True)
class AdapterSource:
    """A folder with an adapter, or a finished run whose adapter is in its folder ``adapter``."""

    path: str

    def locate(self) -> Location | None:
        """Return where the adapter is now; None if there is none."""
        found = filter(formats.is_adapter, (self.path, f"{self.path}/{ADAPTER}"))
        return next(map(Location, found), None)


@dataclass(frozen=True)
class RunSource:
    """A run that may still be training: its newest checkpoint, or its adapter once it is finished.

    Checkpoints hold tensors alone, so the run must have saved an adapter that describes them. It saves one after its
    first validation. Without a checkpoint, that adapter is served.
    """

    path: str

    def locate(self) -> Location | None:
        """Return where the adapter is now; None if there is none."""
        saved = adapter_of_run(self.path)
        if saved is None:
            return None
        if saved.name == ADAPTER and os.path.exists(f"{self.path}/{RESULT}"):
            return Location(str(saved))
        found: list[Path] = []
        with suppress(OSError):
            found = checkpoints_in(Path(self.path, CHECKPOINTS))
        return Location(str(saved), str(found[-1]) if found else None)


Source = AdapterSource | RunSource
"""Where the adapter of a public name comes from."""


def adapters_in(root: Path) -> Iterator[str]:
    """Yield the names of the direct subfolders of `root` that hold an adapter."""
    with storage.reading(root, AdapterFileError), os.scandir(root) as entries:
        for entry in entries:
            if not is_folder_name(entry.name) or not os.path.isdir(entry.path):
                continue
            if entry.is_symlink() and not is_within(entry.path, root):
                continue
            if AdapterSource(entry.path).locate() is not None:
                yield entry.name


def is_folder_name(name: str) -> bool:
    """Return whether `name` is the name of one visible folder, not a path, and can be shown to everyone."""
    return is_public_name(name) and name[0] != "." and not any(char in name for char in "/\\")


def is_public_name(name: str) -> bool:
    """Return whether answers and logs can show a name: without line breaks, half characters or blanks at its ends."""
    return 0 < len(name) <= LONGEST_NAME and name.isprintable() and name == name.strip()


def is_within(path: str | os.PathLike[str], root: Path) -> bool:
    """Return whether the real path is inside the real `root`, and not `root` itself."""
    real, real_root = os.path.realpath(path), os.path.realpath(root)
    return real.startswith(real_root.rstrip(os.sep) + os.sep)


def require_within(location: Location, root: Path) -> None:
    """Reject an adapter with a folder or file outside `root`.

    Raises:
        AdapterFileError: A path leads outside through a symbolic link or ``..``.
    """
    for path in (location.folder, *(file.path for file in location.state())):
        if not is_within(path, root):
            raise AdapterFileError(
                f"'{path}' leads outside '{root}', so it is not served. Copy the files into that folder (cp -rL "
                "resolves symbolic links)."
            )


@dataclass(frozen=True)
class Digests:
    """SHA-256 digests of an adapter's files."""

    whole: str
    """Of all files that determine the adapter."""
    tokenizer: str
    """Of the tokenizer's files."""


def require_size(state: State, most: int) -> None:
    """Reject files that are too large to be read.

    Raises:
        AdapterFileError: A file with tensors has more than `most` bytes, or another file more than `LARGEST_OTHER`.
    """
    for file in state:
        allowed = most if file.path.endswith((".safetensors", ".bin")) else LARGEST_OTHER
        if file.size > allowed:
            raise AdapterFileError(
                f"'{file.path}' is {size(file.size)}, and more than {size(allowed)} is not read. Check the file, or "
                "raise --adapter_memory."
            )


def digests_of(location: Location, state: State) -> Digests:
    """Hash the content of files.

    Raises:
        AdapterFileError: A file cannot be read.
    """
    whole, tokenizer = hashlib.sha256(), hashlib.sha256()
    start = os.path.join(location.folder, "")
    for path in (file.path for file in state):
        name = path.removeprefix(start)  # a checkpoint's path stays whole
        name = name.replace(os.sep, "/") if name != path else os.path.basename(path)
        with storage.reading(path, AdapterFileError):
            part = f"{name}\0{storage.sha256(storage.regular_file(Path(path)))}\0".encode()
        whole.update(part)
        if name not in _FILES:
            tokenizer.update(part)
    return Digests(whole.hexdigest(), tokenizer.hexdigest())


def settled(source: Source) -> tuple[Location, State] | None:
    """Return where an adapter is and the state of its files, once these are old enough to tell a later write.

    Raises:
        AdapterFileError: Its folder cannot be read.
    """
    location = source.locate()
    if location is None:
        return None
    state = location.state()
    newest = max((file.changed for file in state), default=0)
    age = time.time_ns() - newest
    if age < _RESOLUTION:
        time.sleep(min(_RESOLUTION - age, 2 * _RESOLUTION) / 1e9)
    return location, state


def unchanged(location: Location, state: State) -> bool:
    """Return whether the files still have this state."""
    try:
        return location.state() == state
    except LorakitError:
        return False


def _states(folder: str) -> Iterator[FileState]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if not _counts(entry.name):
                continue
            if entry.is_dir():  # additional chat templates
                for path in sorted(os.listdir(entry.path)):
                    yield _stat(os.path.join(entry.path, path))
            else:
                yield _stat(entry.path)


def _stat(path: str) -> FileState:
    found = os.stat(path)
    return FileState(path, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@functools.lru_cache(1000)
def _counts(name: str) -> bool:
    return name in _FILES or any(fnmatch(name, pattern) for pattern in TOKENIZER_FILES)
