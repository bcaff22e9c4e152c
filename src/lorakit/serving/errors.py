"""Errors of serving that a client or an operator can meet."""

from __future__ import annotations

from lorakit.errors import LorakitError


class UnknownAdapterError(LorakitError):
    """A request names an adapter that the server does not have."""


class StoreFullError(LorakitError):
    """The memory for adapters is held by adapters that requests use."""


class EngineStoppedError(LorakitError):
    """No more requests are accepted: the engine was closed or has failed, or the server shuts down."""
