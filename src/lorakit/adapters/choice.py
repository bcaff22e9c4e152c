"""What acts in a forward pass, as one value: for the whole batch, by row, or by spans of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Literal, Protocol

import torch

from lorakit.configuration import is_finite, is_whole
from lorakit.errors import AdapterStateError
from lorakit.ops.lora_linear import Rows

AdapterChoice = str | Mapping[str, float] | None
"""One adapter, a blend of adapters by weight, or none, as users write it."""

Blend = tuple[tuple[str, float], ...]
"""Name and weight of each adapter that acts together; empty is the base alone."""

Part = tuple[Blend, Rows]
"""A blend, and the entries of an axis that it acts on."""


@dataclass(frozen=True)
class Choice:
    """The adapters that act in a forward pass. Choices compare by value, and none refers to a model."""

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
    known_parts: dict[tuple[int, torch.device], list[Part]] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )
    """The parts by size and device: all layers of a pass have the same."""

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

    def runs(self, size: int) -> dict[Blend, list[range]]:
        """Return the runs of entries of each blend on an axis of `size`, which holds rows or tokens in order.

        `size` is a multiple of the number of rows, where each row has consecutive entries, or the number of tokens.
        """
        counts = self.tokens or (size // len(self.blends),) * len(self.blends)
        assert sum(counts) == size
        runs: dict[Blend, list[range]] = {}
        start = 0
        for blend, count in zip(self.blends, counts, strict=True):
            if count:
                own = runs.setdefault(blend, [])
                first = own.pop().start if own and own[-1].stop == start else start
                own.append(range(first, start + count))
                start += count
        return runs

    def parts(self, size: int, device: torch.device) -> list[Part]:
        """Return each blend with its entries of an axis of `size` (see `runs`); indices are on `device`."""
        parts = self.known_parts.get((size, device))
        if parts is None:
            parts = [(blend, _rows(own, device)) for blend, own in self.runs(size).items()]
            if not torch.compiler.is_compiling():
                self.known_parts[size, device] = parts
        return parts


def _rows(runs: Sequence[range], device: torch.device) -> Rows:
    """Return runs of entries as one slice or as an index."""
    if len(runs) == 1:
        return slice(runs[0].start, runs[0].stop)
    return torch.tensor([*chain(*runs)], device=device)


BASE = Choice()
"""The base alone."""


class Adapter(Protocol):
    """What a choice needs to know of an adapter (`InstalledAdapter`)."""

    @property
    def method(self) -> object: ...
    @property
    def scales(self) -> bool: ...


Get = Callable[[str], Adapter]
"""Returns the adapter of a name, or raises an error with the known names."""


def choice_for_batch(choice: AdapterChoice, get: Get) -> Choice:
    """Return a user's choice for the whole batch (`Adapters.activate`)."""
    blend = _blend(choice, get)
    return Choice((blend,)) if blend else BASE


def choice_by_row(rows: Sequence[AdapterChoice], repeat: int, get: Get) -> Choice:
    """Return a user's choice for each row (`Adapters.per_sample`)."""
    if isinstance(rows, str) or not isinstance(rows, Sequence):
        raise AdapterStateError(
            f"per_sample takes one name (or None) for each row of the batch, not {rows!r}."
        )
    if not is_whole(repeat) or repeat < 1:
        raise AdapterStateError(f"repeat is {repeat!r}; it must be a whole number of at least 1.")
    return Choice(tuple(_blend(row, get) for row in rows), "row").repeated(repeat)


def choice_by_token(spans: Iterable[tuple[AdapterChoice, int]], get: Get) -> Choice:
    """Return a user's choice for each span of tokens (`Adapters.per_token`)."""
    spans = tuple(spans)
    for span in spans:
        is_pair = isinstance(span, Sequence) and not isinstance(span, str) and len(span) == 2
        if not is_pair or not is_whole(span[1]) or span[1] < 0:
            raise AdapterStateError(
                f"per_token takes (name, number of tokens) for each span, not {span!r}."
            )
    blends = tuple(_blend(choice, get) for choice, _ in spans)
    return Choice(blends, "token", tuple(count for _, count in spans))


def _blend(choice: AdapterChoice, get: Get) -> Blend:
    """Validate a choice of adapters and return it with all weights."""
    if choice is None:
        return ()
    if not isinstance(choice, (str, Mapping)):
        raise AdapterStateError(
            f"{choice!r} is not a choice of adapters. Give a name, {{name: weight}} for several, or None."
        )
    weights = {choice: 1.0} if isinstance(choice, str) else dict(choice)
    for name, weight in weights.items():
        adapter = get(name)
        if not is_finite(weight):
            raise AdapterStateError(
                f"The weight of '{name}' is {weight!r}; it must be a finite number."
            )
        if (len(weights) > 1 or weight != 1) and not adapter.scales:  # `scales` visits all layers
            raise AdapterStateError(
                f"'{name}' ({type(adapter.method).__name__}) has parts whose effect is not linear in a weight "
                "(DoRA, or biases or modules trained in full). Activate it alone and with weight 1."
            )
    return tuple((name, float(weight)) for name, weight in weights.items())
