"""The matrices of the adapters in use, stacked for decoding steps.

Each layer has a stack, and each blend of adapters has a slot in all stacks: its A and B, in a wide dtype. Batched
products over the slots compute all tokens, each with its own blend (`adapters.stacked_products`).

The slots outlive a step. A batch of another composition writes only the slots of blends that are new.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorakit.adapters.blend_factors import BlendFactors, LayerAdaptersLike
from lorakit.adapters.choice import Blend, Choice, Entries, take
from lorakit.adapters.stacked_products import Part, Rows, rows_of, tiles_of
from lorakit.errors import is_out_of_memory

MAX_CACHED_BLENDS = 256
"""Maximum number of blends whose `BlendFactors` are cached."""

LARGEST_STACKS = 2**30
"""Limit on the bytes of all stacks, unless `SHARE` gives more. Layers beyond it compute one adapter after the other."""

SHARE = 2
"""The same limit as a multiple of the bytes of all adapters: one slot for each adapter, and as many spare slots."""

PERIOD = 100
"""Compositions after which stacks that are much too large are dropped."""


class Arrangement(NamedTuple):
    """How to compute a batch of one composition. Steps of several threads may share it."""

    choice: Choice
    is_active: bool
    """Whether `activate` made the choice, so that trained copies are in place."""
    shape: torch.Size
    """Shape of the batch, (batch, length)."""
    parts: dict[LayerAdaptersLike, Part]
    rows: dict[torch.device, Rows] | None
    """None if all tokens have the same adapters. An input of another shape than the batch's can then be read too."""


class Stacks:
    """The stacks of one model."""

    def __init__(self) -> None:
        self._input_dtypes: dict[LayerAdaptersLike, torch.dtype | None] = {}
        """The dtype of each layer's input; None if the layer cannot use stacks."""
        self._users: weakref.WeakSet[Any] = weakref.WeakSet()
        self._forget(is_active=False)

    def _forget(self, *, is_active: bool) -> None:
        """Drop all matrices, and the layers without adapters."""
        dtypes = self._input_dtypes.items()
        self._input_dtypes = {adapters: dtype for adapters, dtype in dtypes if len(adapters)}
        self._is_active, self._read = is_active, {*self._input_dtypes}
        self._factors: dict[Blend, BlendFactors] = {}
        self._in_use: list[BlendFactors] = []
        self._arrangement: Arrangement | None = None
        self._of_layer: dict[LayerAdaptersLike, Stack] = {}
        self._compositions = self._most_rows = 0
        self._build([], 0)

    def remove(self, name: str) -> None:
        """Forget an adapter. Its slots are free, but keep their memory."""
        for blend in [blend for blend in self._factors if name in dict(blend)]:
            self._drop(blend)

    def _drop(self, blend: Blend) -> None:
        self._factors.pop(blend, None)
        self._slots = [None if other == blend else other for other in self._slots]
        self._in_use, self._arrangement = [], None

    def record_dtype(self, adapters: LayerAdaptersLike, x: Any) -> None:
        """Record the dtype of a layer's input in its first call."""
        if adapters not in self._input_dtypes and isinstance(x, Tensor):
            is_readable = not (isinstance(x, nn.Parameter) or x.is_nested)
            self._input_dtypes[adapters] = x.dtype if is_readable else None

    # --- the composition of a batch ----------------------------------------------------------------------

    def arrange(
        self, choice: Choice, shape: torch.Size, user: Any, *, is_active: bool
    ) -> Arrangement | None:
        """Return how the stacks compute a batch; None if each layer must compute its adapters without them.

        That is so if they do not fit into memory. It is also so if they would have to change while a step of another
        thread lives; `user` is the step of this thread. `shape` is the batch's, (batch, length).
        """
        known = self._arrangement
        if not (
            known is not None
            and known.shape == shape
            and known.is_active == is_active
            and (known.choice is choice or known.choice == choice)
            and len(self._read) == len(self._input_dtypes)
            and (choice.unchanged or all(factors.is_current() for factors in self._in_use))
        ):
            if any(other.thread != user.thread for other in self._users):
                return None
            has_changed = is_active != self._is_active or len(self._read) != len(self._input_dtypes)
            if self._is_too_large() or has_changed:
                self._forget(is_active=is_active)
            self._arrangement = None
            try:
                # Tensors of inference mode could not be written later.
                with torch.inference_mode(False), torch.no_grad():
                    known = self._arrangement = self._arranged(choice, shape)
            except BaseException as error:
                # Stacks that were built in part would keep their memory and their number of slots.
                self._forget(is_active=is_active)
                if not is_out_of_memory(error):
                    raise
                return None
        self._users.add(user)
        return known

    def _arranged(self, choice: Choice, shape: torch.Size) -> Arrangement | None:
        size = shape.numel()
        tokens = {blend: [*chain(*own)] for blend, own in choice.runs(size).items() if blend}
        if not tokens:
            return None
        for blend in tokens:
            factors = self._factors.pop(blend, None)
            if factors is None or not (choice.unchanged or factors.is_current()):
                self._drop(blend)
                factors = BlendFactors(blend, self._read, is_active=self._is_active)
            self._factors[blend] = factors  # the most recently used last
        used = {blend: self._factors[blend] for blend in tokens}
        self._in_use = [*used.values()]
        layers = {layer for factors in self._in_use for layer in factors.ranks}
        layers.difference_update(*(factors.others for factors in self._in_use))
        layers = {layer for layer in layers if self._input_dtypes[layer] is not None}
        if not self._is_active:
            layers = {layer for layer in layers if layer.layout.is_in_order(shape)}
        ranks = {
            layer: max(factors.ranks.get(layer, 0) for factors in self._in_use) for layer in layers
        }
        self._most_rows = max(self._most_rows, len(tokens) * sum(ranks.values()))
        if len(tokens) > len(self._slots) or not all(self._fits(layer) for layer in layers):
            # More slots than are needed, because the next composition may need them.
            spare = len(tokens) if self._slots else 0
            most = max(len(tokens) + spare, len(self._slots))
            self._build(layers, most, least=len(tokens))
        slots = self._assign_slots(tokens)
        layers &= self._of_layer.keys()
        first, *others = tokens
        rows = None
        if others or len(tokens[first]) < size:
            tiles = tiles_of(tokens, slots)
            devices = {self._of_layer[layer].device for layer in layers}
            # One copy of each index to a GPU for all layers: the CPU waits for it.
            rows = {device: rows_of(tiles, size, device) for device in devices}
        masks: dict[Any, Tensor | None] = {}
        parts = {}
        for layer in layers:
            stack = self._of_layer[layer]
            acting = tuple(blend for blend, factors in used.items() if layer in factors.ranks)
            key = acting, stack.device
            if key not in masks:
                own = [token for blend in acting for token in tokens[blend]]
                masks[key] = _mask(own, shape, stack.device)
            parts[layer] = Part(
                [
                    stack.matrices(product.slots, ranks[layer], narrow=product.is_narrow)
                    for product in rows[stack.device].products
                ]
                if rows is not None
                else [stack.matrices(slots[first], ranks[layer])],
                stack.input_dtype,
                masks[key],
            )
        return Arrangement(choice, self._is_active, shape, parts, rows)

    def _is_too_large(self) -> bool:
        """Return, every `PERIOD` compositions, whether the stacks are over four times as large as these needed.

        If memory was too short for all layers, any excess counts. Earlier batches may have had more blends or higher
        ranks.
        """
        self._compositions += 1
        if self._compositions < PERIOD:
            return False
        most, self._compositions, self._most_rows = self._most_rows, 0, 0
        # Spare slots are up to half of all.
        return most * (1 if self._left_out else 4) < self._rows

    def _fits(self, adapters: LayerAdaptersLike) -> bool:
        """Return whether the blends in use fit into a layer's slots; True for a layer left out for lack of memory."""
        stack = self._of_layer.get(adapters)
        return adapters in self._left_out if stack is None else all(map(stack.fits, self._in_use))

    def _build(self, layers: Iterable[LayerAdaptersLike], count: int, *, least: int = 0) -> None:
        """Build empty stacks for these layers and those that have one, with room for the blends in use.

        Args:
            layers: The layers.
            count: Number of slots.
            least: Number of slots if memory is short.
        """
        stacks = {**self._of_layer}
        for layer in layers:
            dtype = self._input_dtypes[layer]
            assert dtype is not None
            if layer not in stacks:
                stacks[layer] = Stack(layer, dtype, self._in_use)
        self._of_layer: dict[LayerAdaptersLike, Stack] = {}
        self._left_out: set[LayerAdaptersLike] = set()
        for stack in stacks.values():
            stack.make_room(self._in_use)
        wanted = sum(stack.bytes_of(count) for stack in stacks.values())
        left = self._most_bytes(wanted)
        count = least if wanted > left else count
        self._slots: list[Blend | None] = [None] * count
        self._rows = count * sum(stack.rank for stack in stacks.values())
        for layer, stack in stacks.items():
            left -= stack.bytes_of(count)
            if left < 0:
                self._left_out.add(layer)
            else:
                stack.allocate(count)
                self._of_layer[layer] = stack

    def _most_bytes(self, wanted: int) -> int:
        """Return how many bytes all stacks may occupy, if they want so many."""
        # Reading the sizes of thousands of small adapters takes longer than a step.
        if wanted <= LARGEST_STACKS:
            return LARGEST_STACKS
        modules = [m for adapters in self._input_dtypes for m in adapters._modules.values()]
        tensors = (t for module in modules for t in (*module.parameters(), *module.buffers()))
        return max(LARGEST_STACKS, SHARE * sum(tensor.nbytes for tensor in tensors))

    def _assign_slots(self, blends: Iterable[Blend]) -> dict[Blend, int]:
        """Return a slot for each blend, and write the blends that have none.

        All are among the first slots, because a step computes every slot up to the last one in use.
        """
        wanted = [*blends]
        reach = min(2 * len(wanted), len(self._slots))
        slots = {blend: i for i, blend in enumerate(self._slots) if blend is not None}
        found = {blend: slots[blend] for blend in wanted if slots.get(blend, reach) < reach}
        free = (i for i in range(reach) if self._slots[i] not in found)
        for blend in wanted:
            if blend not in found:
                if blend in slots:
                    self._slots[slots[blend]] = None  # it moves
                found[blend] = next(free)
                self._write(found[blend], blend)
        for blend in [*self._factors][: max(len(self._factors) - MAX_CACHED_BLENDS, 0)]:
            del self._factors[blend]
        return found

    def _write(self, slot: int, blend: Blend) -> None:
        factors = self._factors[blend]
        for stack in self._of_layer.values():
            # A stack that is too small is not used by this composition: one that uses it builds a larger one.
            if stack.fits(factors):
                stack.write(slot, factors)
        self._slots[slot] = blend


class Stack:
    """The low-rank products of one layer, a slot for each blend.

    Args:
        adapters: The adapters of the layer.
        input_dtype: The dtype of its input.
        blends: Blends, of which at least one acts on the layer.
    """

    def __init__(
        self, adapters: LayerAdaptersLike, input_dtype: torch.dtype, blends: Iterable[BlendFactors]
    ) -> None:
        A, B, _ = next(product for factors in blends for product in factors.products(adapters))
        self.adapters, self.device = adapters, A.device
        self.inputs, self.outputs = A.shape[1], len(B)
        self.dtype = self.input_dtype = input_dtype
        """`dtype` is that of the slots, `input_dtype` that of narrow products."""
        self.rank = 0
        """The largest sum of ranks of a blend."""

    def fits(self, factors: BlendFactors) -> bool:
        """Return whether a blend fits into a slot."""
        rank = factors.ranks.get(self.adapters, 0)
        return rank <= self.rank and torch.promote_types(factors.dtype, self.dtype) == self.dtype

    def make_room(self, blends: Iterable[BlendFactors]) -> None:
        """Make future slots large and wide enough for these blends too."""
        for factors in blends:
            self.rank = max(self.rank, factors.ranks.get(self.adapters, 0))
            self.dtype = torch.promote_types(self.dtype, factors.dtype)

    def bytes_of(self, slots: int) -> int:
        """Return the size of a number of slots."""
        return slots * self.rank * (self.inputs + self.outputs) * self.dtype.itemsize

    def allocate(self, slots: int) -> None:
        """Allocate empty slots."""
        options: Any = {"dtype": self.dtype, "device": self.device}
        self._A = torch.zeros(slots, self.rank, self.inputs, **options)
        self._B = torch.zeros(slots, self.rank, self.outputs, **options)

    def write(self, slot: int, factors: BlendFactors) -> None:
        """Copy the factors of a blend into a slot."""
        A, B = self._A[slot].zero_(), self._B[slot].zero_()
        row = 0
        for product in factors.products(self.adapters):
            rows = slice(row, row + len(product.A))
            A[rows].copy_(product.A).mul_(product.scaling)
            B[rows].copy_(product.B.T)
            row = rows.stop

    def matrices(
        self, slots: int | Entries, rank: int, *, narrow: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return A (..., in, rank) and B (..., rank, out) of one slot or several; in the input's dtype if `narrow`.

        A blend of more ranks than `rank`, the most in use, may have made the slots larger.
        """
        A, B = self._A, self._B
        if rank < self.rank:
            A, B = A[:, :rank], B[:, :rank]
        if isinstance(slots, int):
            A, B = A[slots], B[slots]
        else:
            A, B = take(A, slots), take(B, slots)
        if narrow:
            A, B = A.to(self.input_dtype), B.to(self.input_dtype)
        return A.mT, B


def _mask(tokens: Sequence[int], shape: torch.Size, device: torch.device) -> Tensor | None:
    """Return a mask of some tokens of a batch, shape (batch, length, 1); None if these are all."""
    if len(tokens) == shape.numel():
        return None
    mask = torch.zeros(shape.numel(), dtype=torch.bool)
    mask[tokens] = True
    return mask.view(*shape, 1).to(device)
