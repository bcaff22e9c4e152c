"""The public names of adapters, and the files behind them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lorakit import storage
from lorakit.errors import AdapterFileError, AdapterStateError, LorakitError, nearest
from lorakit.file_names import ADAPTER_CONFIGS
from lorakit.formatting import listed
from lorakit.serving import folders
from lorakit.serving.cards import Card
from lorakit.serving.errors import UnknownAdapterError
from lorakit.serving.folders import AdapterSource, RunSource, Source, State

_Files = tuple[tuple[str, int, int], ...]
"""Path, size and time of modification of each file."""


@dataclass(frozen=True)
class Seen:
    """What was last read from an adapter's files, and the state of the files then."""

    state: State
    digest: str = ""
    bytes: int = 0
    """Size of its tensors on the model."""
    refusal: LorakitError | None = None
    """Why it is not served, in place of a digest."""


@dataclass(eq=False)
class Entry:
    """A public name."""

    source: Source
    seen: Seen | None = None
    card: tuple[State, Card] | None = None

    @property
    def digest(self) -> str | None:
        """Digest of the content that was read last; None if there is none, or it is refused."""
        return (self.seen and self.seen.digest) or None


class Catalogue:
    """The public names of adapters. All methods may be called from any thread.

    Args:
        root: The folder whose direct subfolders hold adapters; None has no such folder.
        pinned: Names whose adapters stay loaded.
        retain: Called under the lock, after each change, with the digests of all contents that have a name, and of
            those that stay loaded.
    """

    def __init__(
        self,
        root: Path | None,
        pinned: Collection[str],
        retain: Callable[[Collection[str], Collection[str]], None],
    ) -> None:
        self.root = root
        self._retain_contents = retain
        self._pinned = frozenset(pinned)
        self._lock = threading.Lock()
        """Guards the tables below, for moments only: never while a file is read or the model changes."""
        self._entries: dict[str, Entry] = {}
        self._removed: dict[str, _Files] = {}
        """The files in folders of the root that `withdraw` has withdrawn, by name."""

    def names(self) -> list[str]:
        """Return the names of all adapters that can be requested, sorted."""
        found = set(folders.adapters_in(self.root)) if self.root is not None else set()
        with self._lock:
            removed = {**self._removed}
        for name in found & removed.keys():
            if _is_withdrawn(AdapterSource(f"{self.root}/{name}"), removed[name]):
                found.discard(name)
        with self._lock:
            entries = {n: e.source for n, e in self._entries.items() if n not in found}
        return sorted({*found, *(name for name, source in entries.items() if _serves(source))})

    def entry(self, name: str) -> Entry:
        """Return the entry of a name; a folder in the root gets one at its first use.

        An entry whose files are gone stays, because a folder is missing for a moment while another replaces it.
        """
        with self._lock:
            entry, removed = self._entries.get(name), self._removed.get(name)
        if entry is not None and _serves(entry.source):
            return entry
        source = self._folder(name)
        if source is None or (removed is not None and _is_withdrawn(source, removed)):
            raise self.unknown(name)
        with self._lock:
            found = self._entries.get(name)
            if found is entry and self._removed.get(name) is removed:  # no other thread was faster
                self._removed.pop(name, None)
                found = self._entries[name] = Entry(source)
        if found is None:
            raise self.unknown(name)
        return found

    def _folder(self, name: str) -> AdapterSource | None:
        """Return the adapter in the root's subfolder of a name; None if there is none."""
        if self.root is None or not folders.is_folder_name(name):
            return None
        source = AdapterSource(f"{self.root}/{name}")
        if not _serves(source):
            return None
        # Windows and macOS also open the folder by other spellings, such as "SQL" for "sql".
        with storage.reading(self.root, AdapterFileError):
            return source if name in os.listdir(self.root) else None

    def unknown(self, name: str) -> UnknownAdapterError:
        """Return the error for a name that no adapter has; it lists the known ones."""
        names = self.names()
        known = f"The known ones are {listed(names)}" if names else "None is known"
        return UnknownAdapterError(f"No adapter is named '{name}'. {known}.{nearest(name, names)}")

    def require_free(self, name: str) -> Entry | None:
        """Raise an AdapterStateError if a name is taken; else return its entry, whose files are gone, if it has one."""
        with self._lock:
            before = self._entries.get(name)
        with suppress(UnknownAdapterError):
            self.entry(name)
            raise _taken(name)
        return before

    def place(
        self, name: str, entry: Entry, before: Entry | None = None, *, replace: bool = False
    ) -> None:
        """Give a name to an adapter.

        Args:
            name: The name.
            entry: The adapter.
            before: What `require_free` returned.
            replace: Do so whatever has the name.

        Raises:
            AdapterStateError: Another thread was faster.
        """
        with self._lock:
            if not replace and self._entries.get(name) is not before:
                raise _taken(name)
            self._entries[name] = entry
            self._removed.pop(name, None)
            self._retain()

    def see(self, entry: Entry, seen: Seen) -> None:
        """Record what an entry's files hold. Their former content has lost its name."""
        with self._lock:
            entry.seen = seen
            self._retain()

    def inside(self, path: str | Path, allows: Callable[[str], bool]) -> AdapterSource:
        """Return the adapter in a folder inside the root.

        Raises:
            AdapterFileError: The path is outside the root, or holds no adapter that the caller may use.
        """
        if self.root is None:
            raise AdapterFileError(
                f"'{path}' cannot be added, because the server has no folder of adapters. Start it with one."
            )
        root = os.path.realpath(self.root)
        joined = os.path.normpath(os.path.join(root, path))
        if "\0" in str(path) or not folders.is_within(joined, self.root):
            raise AdapterFileError(
                f"{str(path)!r} is outside the folder of adapters. Copy the adapter into it, and give its path from "
                "there."
            )
        folder = os.path.relpath(os.path.realpath(joined), root).split(os.sep)[0]
        if not allows(folder) or AdapterSource(joined).locate() is None:
            raise AdapterFileError(
                f"{str(path)!r} holds no adapter: neither {' nor '.join(ADAPTER_CONFIGS)} is there."
            )
        return AdapterSource(joined)

    def _retain(self) -> None:
        """Report the contents that have a name. The caller holds the lock."""
        digests = {name: e.digest for name, e in self._entries.items() if e.digest is not None}
        pinned = [digest for name, digest in digests.items() if name in self._pinned]
        self._retain_contents(digests.values(), pinned)

    def are_pinned(self, names: Collection[str]) -> bool:
        """Return whether all these adapters stay loaded, so that requests for them take no memory from others."""
        return self._pinned.issuperset(names)

    def withdraw(self, name: str) -> None:
        """Withdraw a name, and the files of its subfolder of the root; files that are written later are served.

        Raises:
            AdapterFileError: The root cannot be read.
            UnknownAdapterError: There is no such adapter. A name whose files are gone is withdrawn nevertheless.
        """
        source = self._folder(name)
        files = None if source is None else _files_of(source)
        with self._lock:
            entry = self._entries.pop(name, None)
            is_known = files is not None and files != self._removed.get(name)
            if files is not None:
                self._removed[name] = files
            self._pinned -= {name}
            self._retain()
        if not is_known and (entry is None or not _serves(entry.source)):
            raise self.unknown(name)


def _serves(source: Source) -> bool:
    """Return whether an adapter is there. A run is known before it has saved one."""
    return isinstance(source, RunSource) or source.locate() is not None


def _is_withdrawn(source: Source, removed: _Files) -> bool:
    """Return whether an adapter has the files `removed`, or cannot be read to compare them."""
    return _files_of(source) in ((), removed)


def _files_of(source: Source) -> _Files | None:
    """Return which files an adapter has now; None if it is not there, () if its folder cannot be read.

    Rights are left out, and inodes: those of some network file systems change by themselves.
    """
    location = source.locate()
    if location is None:
        return None
    try:
        return tuple((file.path, file.size, file.modified) for file in location.state())
    except AdapterFileError:
        return ()


def _taken(name: str) -> AdapterStateError:
    return AdapterStateError(
        f"An adapter is named '{name}' already. Choose another name, or replace it (load_inplace)."
    )
