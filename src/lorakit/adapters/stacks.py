"""The matrices of the adapters in use, stacked for decoding steps.

Layers that read the same input (q, k and v; gate and up) share one stack. Each blend of adapters has a slot in it:
the A of these layers, and their B as one block-diagonal matrix, in a wide dtype. One batched product over the slots
computes all tokens, each with its own blend. Tokens are gathered and selected, never masked by a product: NaN of one
adapter stays in its tokens.

The slots outlive a step. A batch of another composition writes only the slots of blends that are new.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorakit.adapters.choice import Blend, Choice
from lorakit.adapters.sources import Layer, Source

LARGEST_B = 2**17
"""The most elements of the B of several layers, in all slots: reading its zeros must cost less than it saves."""

LARGEST_STACKS = 2**30
"""The most bytes of all stacks. Further layers compute one adapter after the other."""


class Input:
    """The layers that read the same tensor."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.layers: list[Layer] = []


class Part(NamedTuple):
    """What a step computes for one layer."""

    shared: SharedInput
    number: int
    """Which layer of `shared` it is."""
    tokens: Tensor | None
    """Mask of the tokens with adapters on this layer, shape (batch, length, 1); None is all."""


class Rows(NamedTuple):
    """How the tokens of a batch are in the rows of a batched product, as indices on one device."""

    gather: Tensor | None
    """The token that each row reads; None if these are all tokens in order."""
    select: Tensor | None
    """The row with the result of each token; None if these are all rows in order."""


class Arrangement(NamedTuple):
    """How to compute a batch of one composition. Steps of several threads may share it."""

    choice: Choice
    is_active: bool
    """Whether `activate` made the choice, so that trained copies are in place."""
    shape: torch.Size
    """Shape of the batch, (batch, length)."""
    parts: dict[Layer, Part]
    matrices: dict[SharedInput, tuple[Tensor, Tensor]]
    """A (in, rank) and B (rank, out) of the slot of all tokens; if they differ, of all slots in use."""
    rows: dict[torch.device, Rows] | None
    """None if all tokens have the same adapters. An input of another shape than the batch's can then be read too."""


class Stacks:
    """The stacks of one model."""

    def __init__(self) -> None:
        self._inputs: list[Input] = []
        self._known: set[Layer] = set()
        self._users: weakref.WeakSet[Any] = weakref.WeakSet()
        self._forget(is_active=False)

    def _forget(self, *, is_active: bool) -> None:
        """Drop all matrices, and the layers without adapters."""
        self._known = {layer for layer in self._known if len(layer)}
        for reading in self._inputs:
            reading.layers = [layer for layer in reading.layers if layer in self._known]
        self._inputs = [reading for reading in self._inputs if reading.layers]
        self._is_active, self._read = is_active, set(self._known)
        self._sources: dict[Blend, Source] = {}
        self._in_use: list[Source] = []
        self._arrangement: Arrangement | None = None
        self._build([], [], 0)

    def remove(self, name: str) -> None:
        """Forget an adapter. Its slots are free, but keep their memory."""
        for blend in [blend for blend in self._sources if name in dict(blend)]:
            self._drop(blend)

    def _drop(self, blend: Blend) -> None:
        self._sources.pop(blend, None)
        self._slots = [None if other == blend else other for other in self._slots]
        self._in_use, self._arrangement = [], None

    def learn(
        self, layer: Layer, x: Any, before: tuple[Tensor, Input] | None
    ) -> tuple[Tensor, Input] | None:
        """Note which layers read the same input, from the first call of each layer.

        Args:
            layer: The layer's adapters.
            x: Its input.
            before: What this method returned for the call before it in the same pass.
        """
        if layer in self._known or not isinstance(x, Tensor):
            return None
        self._known.add(layer)
        if isinstance(x, nn.Parameter) or x.is_nested:
            return None
        if before is None or before[0] is not x:
            before = x, Input(x.dtype)
            self._inputs.append(before[1])
        before[1].layers.append(layer)
        return before

    # --- the composition of a batch ----------------------------------------------------------------------

    def arrange(
        self, choice: Choice, shape: torch.Size, user: Any, *, is_active: bool
    ) -> Arrangement | None:
        """Return how to compute a batch with the adapters as they are now; None if other code must compute it.

        Args:
            choice: The adapters of each row or token.
            shape: Shape of the batch.
            user: The step. While a step of another `thread` lives, the stacks do not change.
            is_active: Whether `activate` made the choice.
        """
        known = self._arrangement
        if not (
            known is not None
            and known.shape == shape
            and known.is_active == is_active
            and (known.choice is choice or known.choice == choice)
            and len(self._read) == len(self._known)
            and all(source.is_current() for source in self._in_use)
        ):
            if any(other.thread != user.thread for other in self._users):
                return None
            if is_active != self._is_active or len(self._read) != len(self._known):
                self._forget(is_active=is_active)
            self._arrangement = None  # also after an error
            # Tensors of inference mode could not be written later.
            with torch.inference_mode(False), torch.no_grad():
                known = self._arrangement = self._arranged(choice, shape)
        self._users.add(user)
        return known

    def _arranged(self, choice: Choice, shape: torch.Size) -> Arrangement | None:
        size = shape.numel()
        tokens = _tokens_by_blend(choice, size)
        if not tokens:
            return None
        for blend in tokens:
            source = self._sources.get(blend)
            if source is None or not source.is_current():
                self._drop(blend)
                self._sources[blend] = Source(blend, self._read, is_active=self._is_active)
        sources = {blend: self._sources[blend] for blend in tokens}
        self._in_use = [*sources.values()]
        layers = {layer for source in self._in_use for layer in source.ranks}
        layers.difference_update(*(source.others for source in self._in_use))
        if not self._is_active:
            layers = {layer for layer in layers if layer.layout.is_in_order(shape)}
        tiles, rows = _tiles(tokens)
        count = len(tiles)
        if (
            not layers <= self._of_layer.keys() | self._left_out
            or not count <= len(self._slots) <= 4 * count
            or any(not shared.fits(s) for s in self._in_use for shared in self._shared)
        ):
            # Some slots more than are needed, because the next composition may need them.
            spare = count // 4 if self._slots and count > len(self._slots) else 0
            self._build(layers, self._in_use, count + spare)
        slots = self._slots_of([blend for blend, _ in tiles])
        parts = self._parts(layers, sources, tokens, shape)
        if len(tiles) == 1 and len(tiles[0][1]) == size:
            matrices = {shared: shared.matrices(slots[0]) for shared in self._shared}
            return Arrangement(choice, self._is_active, shape, parts, matrices, None)
        used = max(slots) + 1
        gather, select = [0] * (used * rows), [0] * size
        for slot, (_, own) in zip(slots, tiles, strict=True):
            first = slot * rows
            gather[first : first + rows] = own + own[:1] * (rows - len(own))
            for row, token in enumerate(own, first):
                select[token] = row
        in_order = gather == [*range(size)]
        devices = {shared.device for shared in self._shared}
        indices = {
            device: Rows(None, None)
            if in_order
            else Rows(torch.tensor(gather, device=device), torch.tensor(select, device=device))
            for device in devices
        }
        matrices = {shared: shared.matrices(slice(used)) for shared in self._shared}
        return Arrangement(choice, self._is_active, shape, parts, matrices, indices)

    def _build(self, layers: Iterable[Layer], sources: list[Source], slots: int) -> None:
        """Build empty stacks for these layers, with room for the blends of `sources`."""
        self._slots: list[Blend | None] = [None] * slots
        self._shared: list[SharedInput] = []
        self._of_layer: dict[Layer, tuple[SharedInput, int]] = {}
        self._left_out: set[Layer] = set()
        layers, left = set(layers), LARGEST_STACKS
        for reading in self._inputs:
            for shared in _stacks(reading, layers, sources, slots):
                left -= shared.bytes_of(slots)
                if left < 0:
                    self._left_out.update(shared.layers)
                    continue
                shared.allocate(slots)
                self._shared.append(shared)
                self._of_layer |= {
                    layer: (shared, number) for number, layer in enumerate(shared.layers)
                }

    def _slots_of(self, blends: list[Blend]) -> list[int]:
        """Return a slot with the matrices of each blend. Two equal blends have two slots."""
        free: dict[Blend | None, list[int]] = {}
        for slot in reversed(range(len(self._slots))):
            free.setdefault(self._slots[slot], []).append(slot)
        found = [free[blend].pop() if free.get(blend) else None for blend in blends]
        others = sorted((slot for own in free.values() for slot in own), reverse=True)
        slots = []
        for blend, slot in zip(blends, found, strict=True):
            if slot is None:
                slot = others.pop()
                self._write(slot, blend)
            slots.append(slot)
        wanted = {*blends, *self._slots}
        for blend in self._sources.keys() - wanted:
            del self._sources[blend]
        return slots

    def _write(self, slot: int, blend: Blend) -> None:
        self._slots[slot] = None
        for shared in self._shared:
            shared.write(slot, self._sources[blend])
        self._slots[slot] = blend

    def _parts(
        self,
        layers: set[Layer],
        sources: dict[Blend, Source],
        tokens: dict[Blend, list[int]],
        shape: torch.Size,
    ) -> dict[Layer, Part]:
        masks: dict[Any, Tensor | None] = {}
        parts = {}
        for layer in layers & self._of_layer.keys():
            shared, number = self._of_layer[layer]
            acting = tuple(blend for blend, source in sources.items() if layer in source.ranks)
            key = acting, shared.device
            if key not in masks:
                own = [token for blend in acting for token in tokens[blend]]
                mask = None
                if len(own) < shape.numel():
                    mask = torch.zeros(shape.numel(), dtype=torch.bool)
                    mask[own] = True
                    mask = mask.view(*shape, 1).to(shared.device)
                masks[key] = mask
            parts[layer] = Part(shared, number, masks[key])
        return parts


class SharedInput:
    """The low-rank products of layers that read the same input, for each slot.

    Args:
        layers: The layers, with the number of outputs of each.
        inputs: The number of inputs.
        rank: The largest sum of ranks of a blend.
        dtype: The dtype of the products.
        device: The device of the adapters.
    """

    def __init__(
        self,
        layers: dict[Layer, int],
        inputs: int,
        rank: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layers, self.inputs, self.rank = layers, inputs, rank
        self.dtype, self.device = dtype, device

    @property
    def outputs(self) -> int:
        """The number of outputs of all layers."""
        return sum(self.layers.values())

    def bytes_of(self, slots: int) -> int:
        """Return the size of a number of slots."""
        return slots * self.rank * (self.inputs + self.outputs) * self.dtype.itemsize

    def allocate(self, slots: int) -> None:
        """Allocate empty slots."""
        options: Any = {"dtype": self.dtype, "device": self.device}
        self._A = torch.zeros(slots, self.rank, self.inputs, **options)
        self._B = torch.zeros(slots, self.rank, self.outputs, **options)

    def fits(self, source: Source) -> bool:
        """Return whether a blend fits into a slot."""
        rank = sum(source.ranks.get(layer, 0) for layer in self.layers)
        return rank <= self.rank and torch.promote_types(source.dtype, self.dtype) == self.dtype

    def write(self, slot: int, source: Source) -> None:
        """Copy the matrices of a blend into a slot."""
        A, B = self._A[slot].zero_(), self._B[slot].zero_()
        row = column = 0
        for layer, width in self.layers.items():
            for product in source.products(layer):
                rows = slice(row, row + len(product.A))
                A[rows].copy_(product.A).mul_(product.scaling)
                B[rows, column : column + width].copy_(product.B.T)
                row = rows.stop
            column += width

    def matrices(self, slots: int | slice) -> tuple[Tensor, Tensor]:
        """Return views of A (..., in, rank) and B (..., rank, out)."""
        return self._A[slots].mT, self._B[slots]


class Reading:
    """What the layers compute that read one tensor (..., in), which does not change meanwhile."""

    def __init__(self, x: Tensor, arrangement: Arrangement) -> None:
        self._x, self._arrangement = x, arrangement
        self._wide: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._deltas: dict[SharedInput, Sequence[Tensor]] = {}

    def delta(self, part: Part, dtype: torch.dtype) -> Tensor:
        """Return what is added to the output of a layer."""
        shared = part.shared
        deltas = self._deltas.get(shared)
        if deltas is None:
            total = self._product(shared).to(dtype)
            widths = [*shared.layers.values()]
            deltas = total.split(widths, dim=-1) if len(widths) > 1 else (total,)
            self._deltas[shared] = deltas
        return deltas[part.number]

    def _product(self, shared: SharedInput) -> Tensor:
        A, B = self._arrangement.matrices[shared]
        rows = self._arrangement.rows
        key = shared.dtype, shared.device
        x = self._wide.get(key)
        if x is None:
            x = self._x.to(shared.dtype)
            if rows is not None:
                gather = rows[shared.device].gather
                x = x.flatten(0, -2)
                x = x if gather is None else x.index_select(0, gather)
                x = x.view(len(A), -1, shared.inputs)
            self._wide[key] = x
        if rows is None:
            return x @ A @ B
        select = rows[shared.device].select
        total = torch.bmm(torch.bmm(x, A), B).view(-1, shared.outputs)
        total = total if select is None else total.index_select(0, select)
        return total.view(*self._x.shape[:-1], shared.outputs)


def _stacks(
    reading: Input, layers: set[Layer], sources: list[Source], slots: int
) -> list[SharedInput]:
    """Return stacks, without slots, for those layers of an input that are in `layers`."""
    stacks: list[SharedInput] = []
    for layer in reading.layers:
        if layer not in layers:
            continue
        own = next(s for s in sources if layer in s.ranks)
        A, B, _ = next(own.products(layer))
        dtype = functools.reduce(torch.promote_types, (s.dtype for s in sources), reading.dtype)
        both = {**(stacks[-1].layers if stacks else {}), layer: len(B)}
        rank = max(sum(s.ranks.get(layer, 0) for layer in both) for s in sources)
        if stacks and slots * rank * sum(both.values()) <= LARGEST_B:
            stacks.pop()
        else:
            both = {layer: len(B)}
            rank = max(s.ranks.get(layer, 0) for s in sources)
        stacks.append(SharedInput(both, A.shape[1], rank, dtype, A.device))
    return stacks


def _tokens_by_blend(choice: Choice, size: int) -> dict[Blend, list[int]]:
    """Return the tokens of each blend, without those that have none; nothing if the choice does not fit."""
    counts = choice.tokens or (size // len(choice.blends),) * len(choice.blends)
    tokens: dict[Blend, list[int]] = {}
    start = 0
    for blend, count in zip(choice.blends, counts, strict=True):
        if blend and count:
            tokens.setdefault(blend, []).extend(range(start, start + count))
        start += count
    return tokens if start == size else {}


def _tiles(tokens: dict[Blend, list[int]]) -> tuple[list[tuple[Blend, list[int]]], int]:
    """Split the tokens of each blend into tiles that each fill a slot; return them and the number of rows of a slot.

    Rows are padded to the longest tile. So a blend with far more tokens than the mean has several slots.
    """
    longest = max(map(len, tokens.values()))
    mean = math.ceil(sum(map(len, tokens.values())) / len(tokens))
    rows = min(longest, 2 * mean)
    tiles = [
        (blend, own[i : i + rows])
        for blend, own in tokens.items()
        for i in range(0, len(own), rows)
    ]
    return tiles, rows
