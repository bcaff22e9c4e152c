"""The errors of serving that a user can see."""

from __future__ import annotations

from lorakit.errors import LorakitError


class UnknownAdapterError(LorakitError):
    """No adapter has this name."""


class StoreFullError(LorakitError):
    """The memory for adapters is held by adapters in use."""
