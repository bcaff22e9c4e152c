"""What the HTTP server uses of the store of adapters (`lorakit.serving.store`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from lorakit.adapters.choice import AdapterChoice
from lorakit.serving.engine import Lease


class StoreStats(Protocol):
    """What the store holds now."""

    @property
    def loaded(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def budget(self) -> int: ...
    @property
    def loads(self) -> int: ...
    @property
    def evictions(self) -> int: ...


class Store(Protocol):
    """Folders of adapters, by name."""

    base_digest: str

    def names(self) -> list[str]: ...
    def acquire(self, choice: AdapterChoice) -> Lease: ...
    def add(self, name: str, path: str | Path, *, replace: bool = False) -> None: ...
    def remove(self, name: str) -> None: ...
    def describe(self, name: str) -> dict[str, Any]: ...
    def stats(self) -> StoreStats: ...
