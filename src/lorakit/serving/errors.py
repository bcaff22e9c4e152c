"""Errors of serving that callers tell apart."""

from __future__ import annotations

from lorakit.errors import LorakitError


class UnknownAdapterError(LorakitError):
    """A request names an adapter that is not served."""


class StoreFullError(LorakitError):
    """The memory for adapters is held by adapters in use."""
