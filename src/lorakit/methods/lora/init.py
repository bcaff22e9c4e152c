"""The initialisations of A, and the block in which PiSSA decomposes no weight."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

Init = Literal["kaiming", "gaussian", "pissa"]

GAUSSIAN_STD = 0.02
"""Standard deviation of A in the first release of the paper's code; the paper gives none."""

_DECOMPOSES: ContextVar[bool] = ContextVar("decomposes", default=True)


@contextmanager
def placeholders() -> Iterator[None]:
    """Skip PiSSA's singular value decompositions inside the block, for a caller that then overwrites the factors.

    The decompositions take an hour for billions of parameters.
    """
    token = _DECOMPOSES.set(False)
    try:
        yield
    finally:
        _DECOMPOSES.reset(token)


def decomposes() -> bool:
    """Whether PiSSA decomposes the weights: outside `placeholders`."""
    return _DECOMPOSES.get()
