"""What acts in a forward pass, as one value: for the whole batch, by row, or by spans of tokens."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

AdapterChoice = str | Mapping[str, float] | None
"""One adapter, a blend of adapters by weight, or none, as users write it."""

Blend = tuple[tuple[str, float], ...]
"""Name and weight of each adapter that acts together; empty is the base alone."""

Entries = slice | Tensor
"""The entries of an axis that share a blend: one contiguous slice, or an int64 index."""


@dataclass(frozen=True)
class Choice:
    """The adapters that act in a forward pass.

    Choices compare by value, and none refers to a model or a tensor.
    """

    blends: tuple[Blend, ...] = ((),)
    """One blend for the whole batch, for each row, or for each span of tokens."""
    unit: Literal["batch", "row", "token"] = "batch"
    tokens: tuple[int, ...] = ()
    """Number of tokens in each span, for the unit "token". Tokens are counted row by row over (batch, length)."""
    repeats: tuple[int, ...] = (1,)
    """For the unit "row": how many times a batch may hold each row, one after the other (for beam search)."""
    names: frozenset[str] = field(init=False, compare=False, repr=False)
    """Names of all adapters that act somewhere."""
    whole: Blend | None = field(init=False, compare=False, repr=False)
    """The blend, if the whole batch has the same one; else None."""

    def __post_init__(self) -> None:
        names = frozenset(name for blend in self.blends for name, _ in blend)
        different = dict.fromkeys(self.blends)
        whole = None if len(different) > 1 else next(iter(different), ())
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "whole", whole)

    @property
    def rows(self) -> tuple[int, ...]:
        """The numbers of rows that a batch may have, for the unit "row"."""
        return tuple(len(self.blends) * repeat for repeat in self.repeats)

    def repeated(self, times: int) -> Choice:
        """Return the choice for batches that may also hold each row `times` as often."""
        repeats = (*self.repeats, *(repeat * times for repeat in self.repeats))
        return replace(self, repeats=tuple(dict.fromkeys(repeats)))

    def parts(self, size: int, device: torch.device) -> list[tuple[Blend, Entries]]:
        """Return each blend with its entries of an axis of `size`, which holds rows or tokens in order.

        Args:
            size: A multiple of the number of rows, where each row has consecutive entries, or the number of tokens.
            device: Device of the indices.
        """
        counts = self.tokens or (size // len(self.blends),) * len(self.blends)
        assert sum(counts) == size
        if torch.compiler.is_compiling():
            return _parts(self.blends, counts, device)
        # An index that was made in inference mode could not be saved for a later backward pass.
        with torch.inference_mode(False):
            return _cached_parts(self.blends, counts, device)


BASE = Choice()
"""The base alone."""


def _parts(
    blends: tuple[Blend, ...], counts: tuple[int, ...], device: torch.device
) -> list[tuple[Blend, Entries]]:
    runs: dict[Blend, list[tuple[int, int]]] = {}
    start = 0
    for blend, count in zip(blends, counts, strict=True):
        own = runs.setdefault(blend, [])
        if own and own[-1][1] == start:
            own[-1] = own[-1][0], start + count
        elif count:
            own.append((start, start + count))
        start += count
    parts: list[tuple[Blend, Entries]] = []
    for blend, own in runs.items():
        if len(own) == 1:
            parts.append((blend, slice(*own[0])))
        elif own:
            indices = [i for first, last in own for i in range(first, last)]
            parts.append((blend, torch.tensor(indices, device=device)))
    return parts


# Every adapted layer of a pass asks for the same parts.
_cached_parts = functools.lru_cache(maxsize=64)(_parts)


def take(x: Tensor, entries: Entries) -> Tensor:
    """Return the entries of the first axis of `x`: a view of a slice, a copy for an index."""
    return x[entries] if isinstance(entries, slice) else x.index_select(0, entries)


def put(x: Tensor, entries: Entries, values: Tensor) -> Tensor:
    """Return `x` with `values` at the entries of its first axis, out of place."""
    if isinstance(entries, slice):
        return torch.slice_scatter(x, values, 0, entries.start, entries.stop)
    return x.index_copy(0, entries, values)
