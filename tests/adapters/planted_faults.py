"""Faults to put into lorakit on purpose, each for the length of a `with` block: the state machine must find them.

Each fault replaces one function. When that function moves, move the fault with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from lorakit.adapters import Adapters, activation
from lorakit.adapters.activation import Activation, Current
from lorakit.methods.lora.layer import LoRALayer

Fault = Callable[[], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def stale_choice() -> Iterator[None]:
    """A layer uses the choice of the lookup before: that of an earlier pass after a change."""
    original = Activation.current

    def current(self: Activation) -> Current:
        now = original(self)
        before = getattr(self, "_last", now)
        self._last = now  # type: ignore[attr-defined]
        fits = before.choice.rows == now.choice.rows and before.choice.tokens == now.choice.tokens
        known = before.choice.names <= self.serials.keys()
        return before if fits and known else now

    with mock.patch.object(Activation, "current", current):
        yield


@contextlib.contextmanager
def wrong_row_order() -> Iterator[None]:
    """`per_sample` gives the adapter of each row to the row after it."""
    original = Adapters.per_sample

    def per_sample(self: Adapters, rows: Any, **options: Any) -> Any:
        moved = [*rows[-1:], *rows[:-1]] if isinstance(rows, list) else rows
        return original(self, moved, **options)

    with mock.patch.object(Adapters, "per_sample", per_sample):
        yield


@contextlib.contextmanager
def lost_scaling() -> Iterator[None]:
    """Merged weights are ``W + B A``."""

    def delta_matrix(self: LoRALayer) -> Any:
        A, B = self.factors()
        return self._product(A, B)

    with mock.patch.object(LoRALayer, "delta_matrix", delta_matrix):
        yield


@contextlib.contextmanager
def unmerge_activates_another() -> Iterator[None]:
    """`unmerge` activates the first adapter, not the merged ones."""
    original = Adapters.unmerge

    def unmerge(self: Adapters) -> None:
        original(self)
        self.activate(self.names[0])

    with mock.patch.object(Adapters, "unmerge", unmerge):
        yield


@contextlib.contextmanager
def recomputation_reads_the_surroundings() -> Iterator[None]:
    """A recomputed checkpoint uses the choice that holds now, not the recorded one."""
    with mock.patch.object(activation, "running_checkpoints", list):
        yield


FAULTS: tuple[Fault, ...] = (
    stale_choice,
    wrong_row_order,
    lost_scaling,
    unmerge_activates_another,
    recomputation_reads_the_surroundings,
)
