"""The adapters that one base serves, by public name: loaded on demand, and shared by content.

An adapter is known by the digest of its files. Its name on the model contains the digest, so two folders with the same
content share one copy, and new content under an old name is another adapter. Requests in flight keep the old one until
their lease ends.

Reading and checking happen in the thread that calls `acquire`; `lorakit.serving.loaded` changes the model. Acquiring a
loaded adapter costs a few calls of `stat`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from lorakit.adapters.attach import handle_for
from lorakit.adapters.choice import AdapterChoice, choice_for_batch
from lorakit.adapters.formats.fingerprint import base_record
from lorakit.errors import AdapterFileError, AdapterStateError, LorakitError, is_momentary
from lorakit.models.dtypes import dtype_name
from lorakit.models.loading import Base
from lorakit.models.processor import in_own_thread
from lorakit.models.tokenizer import tokenizer_digest, tokenizer_in
from lorakit.serving import folders
from lorakit.serving.cards import Card, read_card
from lorakit.serving.catalogue import Catalogue, Entry, Seen
from lorakit.serving.engine import Holders, Lease, Receipt
from lorakit.serving.folders import AdapterSource, Location, RunSource, Source, State
from lorakit.serving.loaded import (
    Loaded,
    LoadedAdapters,
    StoreStats,
    Tokenizer,
    require_blendable,
)
from lorakit.serving.preparing import base_labels, prepare
from lorakit.serving.reports import find_report

T = TypeVar("T")

_ATTEMPTS = 5
"""How often files are read that change meanwhile."""
_READ = 4
"""Most bytes of a file with tensors, in sizes of the budget: float64 tensors may become bfloat16."""
_ANY: Any = SimpleNamespace(method=None, scales=True)
"""An adapter that can be blended, to validate a choice before its adapters are loaded."""


class AdapterStore:
    """The adapters that one base serves. All methods may be called from any thread but the engine's.

    `Lease.release` may also be called in the engine's thread.

    Args:
        base: The base. The store keeps a handle on its model, `handle`, until the process ends.
        root: The folder whose direct subfolders hold adapters; None serves the followed runs alone.
        budget: Most bytes of the tensors of loaded adapters.
        followed: Training runs, path by name. Each is served while it goes on, and may be outside the root.
        pinned: Names of adapters that are loaded now and stay loaded. No forward pass may run yet.
        between_steps: Runs an action while no forward pass of the model runs, and returns its result.
        allow_other_base: Load adapters that record another base, and log a warning.

    Raises:
        LorakitError: A pinned adapter cannot be loaded, or a followed run has the name of an adapter.
    """

    def __init__(
        self,
        base: Base,
        root: Path | None,
        *,
        budget: int,
        followed: Mapping[str, str] | None = None,
        pinned: Collection[str] = (),
        between_steps: Callable[[Callable[[], T]], T] = lambda action: action(),
        allow_other_base: bool = False,
    ) -> None:
        tokenizer = base.text_tokenizer  # first: an error must leave the model as it is
        self.base, self.root, self.budget = base, root, budget
        self.handle = handle_for(base.model)
        """The handle on the model; the names of a lease's blend are names of its adapters."""
        self.handle.keep()
        self._record = base_record(base.model, exclude=base.new_weights, tokenizer=tokenizer)
        self.base_digest = self._record.exact or self._record.shapes
        """SHA-256 of the base's weights; of their names and shapes, where weights cannot be hashed."""
        self._loaded = LoadedAdapters(self.handle, budget)
        self._catalogue = Catalogue(root, pinned, self._loaded.retain)
        self._allow_other_base = allow_other_base
        self._tokenizer = Tokenizer(tokenizer, tokenizer_digest(tokenizer))
        self._tokenizers: WeakValueDictionary[str, Tokenizer] = WeakValueDictionary()
        """Tokenizers of adapter folders, by the digest of their files."""
        self.freed: Callable[[], None] = lambda: None
        """Called, in any thread, when adapters may have become idle; not by an `acquire` that fails."""
        for name, run in (followed or {}).items():
            free = self._catalogue.require_free(name)
            self._catalogue.place(name, Entry(RunSource(os.path.realpath(run))), free)
        for name in sorted(set(pinned)):
            self.acquire(name).release()
        self._loaded.between_steps = between_steps

    # --- names -------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Return the names of all adapters that can be requested, sorted."""
        return self._catalogue.names()

    def are_pinned(self, names: Collection[str]) -> bool:
        """Return whether all these adapters stay loaded, so that requests for them take no memory from others."""
        return self._catalogue.are_pinned(names)

    def add(
        self,
        name: str,
        path: str | Path,
        *,
        replace: bool = False,
        allows: Callable[[str], bool] = lambda folder: True,
    ) -> None:
        """Serve the adapter at `path` under a name, after loading it once.

        Args:
            name: The public name.
            path: Its folder, inside the root; a relative path starts there.
            replace: Replace an adapter of this name. Requests in flight keep the old one.
            allows: Returns whether the caller may use a direct subfolder of the root. If not, an adapter in it is an
                error as if it did not exist.

        Raises:
            AdapterStateError: The name is taken or not printable, or a batch of several adapters cannot use it.
            AdapterFileError: The path is outside the root, holds no adapter, or a damaged or too large one.
            WrongBaseError: It was trained on another base.
            StoreFullError: Adapters in use hold the memory.
        """
        if not folders.is_public_name(name):
            raise AdapterStateError(
                f"{name!r:.80} cannot name an adapter. Use up to {folders.LONGEST_NAME} printable characters."
            )
        entry = Entry(self._catalogue.inside(path, allows))
        free = None if replace else self._catalogue.require_free(name)
        loaded = self._acquire(name, entry)
        try:
            self._catalogue.place(name, entry, free, replace=replace)
        finally:
            self._loaded.give_back(loaded)
            self.freed()

    def remove(self, name: str) -> None:
        """Withdraw a name at once. Its memory is freed when the last lease ends; this method does not wait for it.

        The files stay, and `add` serves them again. So does a new store. Files that are written later into a subfolder
        of the root with that name are served.

        Raises:
            AdapterFileError: The root cannot be read.
            UnknownAdapterError: There is no such adapter. A name whose files are gone is withdrawn nevertheless.
        """
        try:
            self._catalogue.withdraw(name)
        finally:
            self.freed()

    # --- leases ------------------------------------------------------------------------------------------

    def acquire(self, choice: AdapterChoice) -> Lease:
        """Load adapters if they are not loaded, and keep them loaded until the lease is released.

        Args:
            choice: A name, ``{name: weight}`` for a blend, or None for the base alone.

        Raises:
            UnknownAdapterError: A name is unknown; the message lists the known ones.
            AdapterFileError: The file is damaged or unsafe, changes while it is read, or does not fit the model or the
                budget.
            WrongBaseError: It was trained on another base.
            AdapterStateError: A batch of several adapters cannot use it, or the adapters cannot be blended.
            StoreFullError: Adapters in use hold the memory.
        """
        weights = dict(choice_for_batch(choice, lambda _: _ANY).blends[0])
        if not weights:
            return self._lease_of_base()
        held: dict[str, Loaded] = {}
        try:
            for name in weights:
                held[name] = self._acquire(name, self._catalogue.entry(name), beside=held.values())
            blend: dict[str, float] = {}
            for name, weight in weights.items():  # two names may have the same content
                blend[held[name].name] = blend.get(held[name].name, 0.0) + weight
            checked = self.handle.blend(blend)
            require_blendable(held)
        except BaseException:
            self._loaded.give_back(*held.values())
            raise

        def release() -> None:
            self._loaded.give_back(*held.values())
            self.freed()

        one, holders = next(iter(held.values())), Holders(release)
        adapters = tuple((name, held[name].digest, weight) for name, weight in weights.items())
        receipt = Receipt(self.base_digest, adapters)
        return Lease(
            checked, receipt, one.tokenizer.tokenizer, one.labels, one.outputs, one.task, holders
        )

    def _lease_of_base(self) -> Lease:
        if self.base.new_weights:
            raise AdapterStateError(
                f"The base has no trained '{self.base.new_weights[0]}', so its own answers would be random. Choose an "
                "adapter."
            )
        outputs, labels = base_labels(self.base.model)
        receipt = Receipt(self.base_digest)
        return Lease(
            (), receipt, self.base.text_tokenizer, labels, outputs, None, Holders(lambda: None)
        )

    def _acquire(self, name: str, entry: Entry, beside: Collection[Loaded] = ()) -> Loaded:
        """Return the loaded adapter of an entry, with one more lease. The request also holds those `beside` it."""
        location = entry.source.locate()
        if location is None:
            raise self._vanished(name, entry)
        state = location.state()
        seen = entry.seen
        if seen is not None and seen.state == state:
            if seen.refusal is not None:
                raise type(seen.refusal)(*seen.refusal.args)
            if loaded := self._loaded.take(seen.digest):
                return loaded
            self._loaded.require_room(seen.bytes, location.path, beside)  # before it is read
        for _ in range(_ATTEMPTS):
            found = folders.settled(entry.source)
            if found is None:
                raise self._vanished(name, entry)
            location, state = found
            try:
                loaded = self._load(entry, location, state, beside)
            except LorakitError:
                if folders.unchanged(location, state):
                    raise
                continue
            if loaded is not None:
                return loaded
        raise AdapterFileError(
            f"'{location.path}' changed each time it was read. Write a new adapter into another folder and rename it."
        )

    def _see(self, entry: Entry, seen: Seen) -> None:
        self._catalogue.see(entry, seen)
        self.freed()

    def _vanished(self, name: str, entry: Entry) -> LorakitError:
        """Return the error for a name whose files are gone."""
        if isinstance(entry.source, RunSource):
            return AdapterFileError(
                f"The run '{entry.source.path}' of '{name}' has saved no adapter yet. It saves one after its first "
                "validation, and at its end."
            )
        return self._catalogue.unknown(name)

    def _require_allowed(self, source: Source, location: Location) -> None:
        if isinstance(source, AdapterSource):
            assert self.root is not None
            folders.require_within(location, self.root)

    def _load(
        self, entry: Entry, location: Location, state: State, beside: Collection[Loaded]
    ) -> Loaded | None:
        """Return the adapter in an entry's files, with one more lease; None if they have changed meanwhile."""
        with self._refusing(entry, location, state):
            self._require_allowed(entry.source, location)
            folders.require_size(state, max(_READ * self.budget, folders.LARGEST_OTHER))
            digests = folders.digests_of(location, state)
        with self._loaded.loading(digests.whole):
            loaded, prepared = self._loaded.take(digests.whole), None
            if loaded is None:
                with self._refusing(entry, location, state):
                    tokenizer = self._tokenizer_of(location, digests.tokenizer)
                    prepared = in_own_thread(
                        lambda: prepare(
                            self.base,
                            location,
                            allow_other_base=self._allow_other_base,
                            tokenizer=tokenizer.digest,
                            record=self._record,
                        )
                    )
                if not folders.unchanged(location, state):
                    return None
                outputs, labels = prepared.outputs, prepared.labels
                loaded = Loaded(
                    digests.whole, prepared.bytes, outputs, labels, tokenizer, prepared.task
                )
            self._see(entry, Seen(state, digests.whole, loaded.bytes))
            if prepared is not None:
                self._loaded.install(loaded, prepared, location.path, beside)
        return loaded

    @contextmanager
    def _refusing(self, entry: Entry, location: Location, state: State) -> Iterator[None]:
        """Remember an error in the block as that of an entry's files, unless the system lacked something."""
        try:
            yield
        except LorakitError as error:
            cause: BaseException | None = error
            while cause is not None and not is_momentary(cause):
                cause = cause.__cause__ or cause.__context__
            if cause is None and folders.unchanged(location, state):
                # A copy: the error's traceback would keep the tensors that were read.
                self._see(entry, Seen(state, refusal=type(error)(*error.args)))
            raise

    def _tokenizer_of(self, location: Location, files: str) -> Tokenizer:
        """Return the folder's own tokenizer, read once for all folders with the same files; else the base's."""
        if not location.has_tokenizer:
            return self._tokenizer
        found = self._tokenizers.get(files)
        if found is None:
            own = tokenizer_in(location.folder)
            digest = tokenizer_digest(own)
            found = self._tokenizer if digest == self._tokenizer.digest else Tokenizer(own, digest)
            self._tokenizers[files] = found
        return found

    # --- descriptions ------------------------------------------------------------------------------------

    def describe(self, name: str) -> dict[str, Any]:
        """Describe an adapter without loading it, for lists and cards.

        Returns:
            The fields of `Card`, with ``digest``, ``loaded`` and ``report``, whether `report` finds one. ``digest`` is
            None until the files, as they are now, have been read. ``chat`` says whether the adapter answers chats. A
            damaged folder has ``error``, and None for the rest.

        Raises:
            UnknownAdapterError: There is no such adapter.
        """
        entry = self._catalogue.entry(name)
        location = entry.source.locate()
        seen, card, error = entry.seen, Card(), None
        report = self._report(entry.source, location)
        own = {"digest": None, "loaded": False, "report": report is not None}
        if location is None:
            return {**vars(card), **own, "error": "no adapter yet"}
        try:
            state = location.state()
            if seen is not None and seen.state == state:
                own |= {"digest": seen.digest or None, "loaded": seen.digest in self._loaded}
            if entry.card is None or entry.card[0] != state:
                self._require_allowed(entry.source, location)
                entry.card = state, read_card(location, state)
            card = entry.card[1]
        except LorakitError as wrong:
            error = str(wrong)
        if card.path is not None and card.chat is None:
            card = replace(card, chat=self._has_template)
        return {**vars(card), **own, "error": error}

    def describe_base(self) -> dict[str, Any]:
        """Describe the base.

        Returns:
            Its ``digest``, ``dtype``, its ``kind`` of output (text, classification or regression), and ``chat``,
            whether its tokenizer has a chat template.
        """
        outputs, _ = base_labels(self.base.model)
        kind = "text" if outputs is None else "regression" if outputs == 1 else "classification"
        return {
            "digest": self.base_digest,
            "kind": kind,
            "chat": self._has_template,
            "dtype": dtype_name(self.base.model.dtype),
        }

    @property
    def _has_template(self) -> bool:
        """Whether the base's tokenizer has a chat template."""
        return bool(self._tokenizer.tokenizer.chat_template)

    def report(self, name: str) -> Path | None:
        """Return the report of the run that an adapter comes from; None if there is none that may be shown.

        Raises:
            UnknownAdapterError: There is no such adapter.
        """
        entry = self._catalogue.entry(name)
        return self._report(entry.source, entry.source.locate())

    def _report(self, source: Source, location: Location | None) -> Path | None:
        root = source.path if isinstance(source, RunSource) else self.root
        return find_report(location.folder, root) if location and root else None

    def stats(self) -> StoreStats:
        """Return what the store holds now."""
        return self._loaded.stats()
