"""The adapters on the model: which are in use, which leave when memory is short, and every change of the model.

A change goes through `between_steps`, because no forward pass may run then. One change waits at a time, and no other
lock is held meanwhile: leases of loaded adapters are taken and released without waiting.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

from transformers import PreTrainedTokenizerBase

from lorakit.adapters.handle import Adapters
from lorakit.errors import AdapterFileError, AdapterStateError
from lorakit.formatting import size
from lorakit.serving.errors import StoreFullError
from lorakit.serving.preparing import Prepared

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer with the digest of what determines its ids."""

    tokenizer: PreTrainedTokenizerBase
    digest: str | None


@dataclass(eq=False)
class Loaded:
    """An adapter on the model."""

    digest: str
    bytes: int
    outputs: int | None
    labels: tuple[str, ...]
    tokenizer: Tokenizer
    task: str | None
    leases: int = 1
    used: int = 0
    """When a lease was last taken or returned, as a count."""

    @property
    def name(self) -> str:
        """Its name on the model."""
        return f"a{self.digest[:24]}"


@dataclass(frozen=True)
class StoreStats:
    """What the store holds now."""

    loaded: int
    """Adapters on the model."""
    bytes: int
    """Size of the tensors of loaded adapters."""
    budget: int
    loads: int
    """Adapters loaded so far."""
    evictions: int
    """Adapters unloaded so far to make room."""
    leases: int
    """Leases of adapters; one of a blend counts once for each name."""


class LoadedAdapters:
    """The adapters on the model of a handle, by digest. Their tensors have at most `budget` bytes."""

    def __init__(self, handle: Adapters, budget: int) -> None:
        self.handle, self.budget = handle, budget
        self.between_steps: Callable[[Callable[[], Any]], Any] = lambda action: action()
        self.bytes = 0
        """Of all adapters on the model, and of one that is being installed."""
        self.loads = self.evictions = 0
        self._lock = threading.Lock()
        """Guards the tables, for moments only."""
        self._changes = threading.Lock()
        """Held for the length of a change of the model. The engine's thread never takes it."""
        self._usable: dict[str, Loaded] = {}
        self._garbage: list[Loaded] = []
        """Adapters that no name and no lease refers to."""
        self._named: frozenset[str] = frozenset()
        self._pinned: frozenset[str] = frozenset()
        self._loading: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()
        """By digest, the lock of its loading, while a thread holds or wants it."""
        self._clock = itertools.count()
        self._collector: threading.Thread | None = None
        """Removes garbage from the model; None once it has found no more."""

    def __contains__(self, digest: object) -> bool:
        return digest in self._usable

    def stats(self) -> StoreStats:
        """Return the present numbers."""
        with self._lock:
            return StoreStats(
                loaded=len(self._usable) + len(self._garbage),
                bytes=self.bytes,
                budget=self.budget,
                loads=self.loads,
                evictions=self.evictions,
                leases=sum(loaded.leases for loaded in self._usable.values()),
            )

    def take(self, digest: str) -> Loaded | None:
        """Return a loaded adapter with one more lease; None if it is not loaded."""
        with self._lock:
            loaded = self._usable.get(digest)
            if loaded is not None:
                loaded.leases += 1
                loaded.used = next(self._clock)
            return loaded

    def give_back(self, *several: Loaded) -> None:
        """Return a lease of each adapter. Another thread removes those that have lost their name."""
        with self._lock:
            for loaded in several:
                loaded.leases -= 1
                loaded.used = next(self._clock)
                self._drop_if_unused(loaded)
            self._start_collector()

    def retain(self, named: Collection[str], pinned: Collection[str]) -> None:
        """Set the digests that have names, and those that stay loaded. Another thread removes all others.

        It removes an adapter after its last lease.
        """
        with self._lock:
            self._named, self._pinned = frozenset(named), frozenset(pinned)
            for loaded in list(self._usable.values()):
                self._drop_if_unused(loaded)
            self._start_collector()

    def _drop_if_unused(self, loaded: Loaded) -> None:
        is_usable = self._usable.get(loaded.digest) is loaded
        if is_usable and not loaded.leases and loaded.digest not in self._named:
            self._garbage.append(self._usable.pop(loaded.digest))

    def _start_collector(self) -> None:
        """Remove garbage in a thread of its own, which waits for a step of the engine. The caller holds the lock."""
        if self._garbage and self._collector is None:
            collector = threading.Thread(target=self.collect, daemon=True)
            collector.start()
            self._collector = collector

    def loading(self, digest: str) -> threading.Lock:
        """Return the lock of a digest: one thread at a time loads its adapter."""
        with self._lock:
            return self._loading.setdefault(digest, threading.Lock())

    def install(
        self, loaded: Loaded, prepared: Prepared, path: str, beside: Collection[Loaded]
    ) -> None:
        """Put a prepared adapter on the model, and unload others if memory is short.

        Args:
            loaded: The adapter, with its first lease.
            prepared: Its modules.
            path: Its folder, for the message.
            beside: Adapters that its request holds too.

        Raises:
            StoreFullError: Adapters that other requests use hold the memory.
            AdapterFileError: There would be too little memory without them too.
        """
        with self._changes:
            with self._lock:
                evicted = self._to_evict(loaded.bytes, path, beside)
                for other in evicted:
                    del self._usable[other.digest]
                self.evictions += len(evicted)
                self.bytes += loaded.bytes
            try:
                self._change(evicted, lambda: self._add(loaded, prepared))
            except BaseException:
                with self._lock:
                    self.bytes -= loaded.bytes
                raise
            with self._lock:
                loaded.used = next(self._clock)
                self._usable[loaded.digest] = loaded
                self.loads += 1

    def _add(self, loaded: Loaded, prepared: Prepared) -> None:
        stored = prepared.stored
        with self.handle.changing():
            self.handle.add(
                loaded.name,
                stored.method,
                prepared.modules,
                stored.trained,
                trainable=False,
                provenance=stored.provenance,
            )

    def require_room(self, needed: int, path: str, beside: Collection[Loaded]) -> None:
        """Raise if an adapter of `needed` bytes cannot be installed now (`install`)."""
        with self._changes, self._lock:  # no change is under way, which would hold memory
            self._to_evict(needed, path, beside)

    def _to_evict(self, needed: int, path: str, beside: Collection[Loaded]) -> list[Loaded]:
        """Return the adapters to unload to free `needed` bytes, the least recently used first."""
        staying = self._pinned.union(other.digest for other in beside)
        most = self.budget - sum(o.bytes for o in self._usable.values() if o.digest in staying)
        if needed > most:
            raise AdapterFileError(
                f"'{path}' needs {size(needed)}, more than the {size(most)} of --adapter_memory that neither pinned "
                "adapters nor the others of its blend occupy. Raise --adapter_memory."
            )
        free = self.budget - self.bytes + sum(other.bytes for other in self._garbage)
        idle = [
            other
            for other in self._usable.values()
            if not other.leases and other.digest not in self._pinned
        ]
        evicted: list[Loaded] = []
        for other in sorted(idle, key=lambda other: other.used):
            if free >= needed:
                break
            evicted.append(other)
            free += other.bytes
        if free < needed:
            raise StoreFullError(
                f"'{path}' needs {size(needed)}, and {size(max(0, free))} of the {size(self.budget)} for adapters can "
                "be freed: the others are in use or pinned. Try again later, or raise --adapter_memory."
            )
        return evicted

    def collect(self) -> None:
        """Remove the adapters that nothing can use any more from the model, also those that come meanwhile."""
        has_failed = False
        with self._changes:
            while True:
                with self._lock:
                    if has_failed or not self._garbage:
                        self._collector = None
                        return
                try:
                    self._change()
                except Exception as error:
                    # The engine has died, or a forward pass runs: the next change tries again.
                    _LOG.debug("unloading is put off: %s", error)
                    has_failed = True

    def _change(
        self, evicted: Collection[Loaded] = (), then: Callable[[], None] = lambda: None
    ) -> None:
        """Remove evicted adapters and garbage from the model between two forward passes.

        Those that stay after an error are garbage.
        """
        leaving, gone = [*evicted], list[Loaded]()

        def change() -> None:
            with self._lock:
                # Also what came while this change waited for its step.
                leaving.extend(self._garbage)
                self._garbage = []
            for other in leaving:
                self.handle.remove(other.name)
                gone.append(other)
            then()

        try:
            self.between_steps(change)
        finally:
            with self._lock:
                self.bytes -= sum(other.bytes for other in gone)
                self._garbage += [other for other in leaving if other not in gone]


def require_blendable(held: Mapping[str, Loaded]) -> None:
    """Reject a blend of adapters that read different tokens or give different answers.

    Raises:
        AdapterStateError: Two adapters differ.
    """
    (first, one), *others = held.items()
    for name, other in others:
        pair = f"'{first}' and '{name}'"
        if other.tokenizer.digest != one.tokenizer.digest:
            raise AdapterStateError(
                f"{pair} have different tokenizers, so a prompt has no common tokens for a blend of them. Request them "
                "one by one."
            )
        if (other.outputs, other.labels) != (one.outputs, one.labels):
            raise AdapterStateError(
                f"{pair} predict different labels, so a blend of them has no meaning. Request them one by one."
            )
