"""Decoding: the thin matrices of the adapters in use, copied into slots that die with the block that made them.

A decoding step has a few tokens and no gradients, and its operations cost more than their arithmetic. So each layer
keeps A and B of all adapters in use in two tensors, and one pair of batched products computes all tokens, each with its
own blend. Adapters are not edited while a block that keeps slots is open.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.adapters.choice import Blend, Choice
from lorakit.methods.lora.layer import LoRALayer
from lorakit.methods.module import LowRank
from lorakit.ops.autocast import no_autocast, wide_dtype
from lorakit.ops.lora_linear import take

MOST_TOKENS = 512
"""The most tokens of a decoding step."""

FEW_TOKENS = 7
"""The most tokens of a blend in its slot. For more, a product of its own in the dtype of the base is faster: with 128
tokens of each of two blends, bfloat16 takes half as long as float32; with one token of each of eight, twice as long."""

FEW_WHOLE_TOKENS = 32
"""The same, if all tokens have the same blend."""

MOST_SLOTS = 128
"""Blends that have slots at the same time."""

Key = tuple[tuple[int, float], ...]
"""A blend by the serial numbers of its adapters, which are never given again: another adapter of the same name has
another key."""


class Modules(Protocol):
    """The adapters of a layer by name (`LayerAdapters`)."""

    _modules: dict[str, Any]

    def __hash__(self) -> int: ...


class Step(NamedTuple):
    """How the slots compute some tokens."""

    blends: dict[int, Blend]
    """The blend in each slot in use; that of the base alone is a slot of zeros."""
    reach: int
    """The slots up to the last one in use: a view, with those in between that compute nothing."""
    read: Tensor | None
    """The token that each row of the slots reads, slot after slot; None if these are all tokens in order."""
    select: Tensor | None
    """The row with the result of each token; None if these are all rows in order."""
    others: frozenset[Blend]
    """The blends with too many tokens for slots, which add nothing to theirs."""


class Slots:
    """The slots of one block, on all layers."""

    def __init__(self) -> None:
        self._keys: list[Key | None] = []
        """The blend of each slot."""
        self._layers: dict[Modules, _Layer] = {}
        self._refused: dict[Modules, Step] = {}
        """The layers on which a blend of the step has another effect than a product."""
        self._known: tuple[Choice, int, Step | None] | None = None
        """The last step."""
        self._shared: tuple[Tensor, int, Tensor] | None = None
        """The last input of a layer, its version, and the rows of it that the slots read: q, k and v share them."""
        self._row_factors: dict[Any, Tensor] = {}

    def forget(self) -> None:
        """Drop all matrices: a pass with gradients may be followed by an optimizer step."""
        if self._known is not None or self._row_factors:
            Slots.__init__(self)

    def row_factors(self, module: LoRALayer, layer: nn.Module) -> Tensor:
        """Return DoRA's factors on the rows of a layer's output, computed once: they cost as much as a prompt."""
        if module not in self._row_factors:
            self._row_factors[module] = module.row_factors(layer)
        return self._row_factors[module]

    # --- the tokens of a step ----------------------------------------------------------------------------

    def step(
        self, choice: Choice, serials: Mapping[str, int], size: int, device: torch.device
    ) -> Step | None:
        """Return how to compute `size` tokens; None if they are faster without slots.

        `serials` are the serial numbers of the adapters by name.
        """
        if size > MOST_TOKENS:
            return None
        known = self._known
        if known is None or known[1] != size or not (known[0] is choice or known[0] == choice):
            known = choice, size, self._arranged(choice, serials, size, device)
        self._known = choice, size, known[2]
        return known[2]

    def _arranged(
        self, choice: Choice, serials: Mapping[str, int], size: int, device: torch.device
    ) -> Step | None:
        runs = choice.runs(size) if choice.whole is None else {choice.whole: [range(size)]}
        tokens = {blend: [*chain(*own)] for blend, own in runs.items()}
        limit = FEW_TOKENS if len(tokens) > 1 else FEW_WHOLE_TOKENS
        few = {blend: own for blend, own in tokens.items() if len(own) <= limit}
        if not any(few) or len(few) > MOST_SLOTS:
            return None
        keys = {tuple((serials[name], w) for name, w in blend): blend for blend in few}
        blends = {slot: keys[key] for key, slot in self._assign([*keys]).items()}
        reach, rows = max(blends) + 1, max(map(len, few.values()))
        by_slot = [few[blends[slot]] if slot in blends else [] for slot in range(reach)]
        read = [token for own in by_slot for token in (*own, *[0] * (rows - len(own)))]
        row_of = {t: slot * rows + i for slot, own in enumerate(by_slot) for i, t in enumerate(own)}
        select = [row_of.get(token, len(read)) for token in range(size)]
        return Step(
            blends,
            reach,
            None if read == [*range(size)] else torch.tensor(read, device=device),
            None if select == [*range(len(read))] else torch.tensor(select, device=device),
            frozenset(tokens.keys() - few.keys()),
        )

    def _assign(self, wanted: Sequence[Key]) -> dict[Key, int]:
        """Return a slot for each blend: its own, or one that no wanted blend has.

        All are among the first slots, because a step computes every slot up to the last one in use.
        """
        reach = 2 * len(wanted)
        self._keys += [None] * (reach - len(self._keys))
        found = {
            key: slot
            for slot, key in enumerate(self._keys[:reach])
            if key is not None and key in wanted
        }
        free = iter([slot for slot in range(reach) if self._keys[slot] not in found])
        for key in wanted:
            if key not in found:
                slot = found[key] = next(free)
                self._keys = [None if other == key else other for other in self._keys]  # it moves
                self._keys[slot] = key
        return found

    # --- the products of a layer -------------------------------------------------------------------------

    def delta(self, adapters: Modules, step: Step, x: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Return what a step adds to a layer's output, (..., out); None if the slots cannot compute it.

        Args:
            adapters: The layer's adapters.
            step: What `step` has returned.
            x: The layer's input, (..., in).
            dtype: Dtype of the output.
        """
        layer = self._layers.get(adapters)
        if layer is None or layer.step is not step:
            layer = None if self._refused.get(adapters) is step else self._written(adapters, step)
            if layer is None:
                self._refused[adapters] = step
                return None
        A, B = layer.A[: step.reach], layer.B[: step.reach]
        with no_autocast(x):
            rows = self._rows(x, step, A.dtype)
            delta = torch.bmm(torch.bmm(rows, A.mT), B).flatten(0, 1).to(dtype)
        if step.others:
            delta = F.pad(delta, (0, 0, 0, 1))  # a row of zeros for their tokens
        if step.select is not None:
            delta = delta.index_select(0, step.select.to(x.device))
        return delta.view(*x.shape[:-1], delta.shape[-1])

    def _rows(self, x: Tensor, step: Step, dtype: torch.dtype) -> Tensor:
        """Return the inputs of the slots, (slots, rows, in)."""
        version = -1 if x.is_inference() else x._version  # a tensor of inference mode counts none
        shared = self._shared
        if shared is None or shared[0] is not x or shared[1] != version or version < 0:
            read = None if step.read is None else step.read.to(x.device)
            rows = take(x.flatten(0, -2), read).to(dtype).reshape(step.reach, -1, x.shape[-1])
            shared = self._shared = x, version, rows
        return shared[2].to(dtype)

    @torch.inference_mode(False)  # a tensor of inference mode could not be written later
    @torch.no_grad()
    def _written(self, adapters: Modules, step: Step) -> _Layer | None:
        """Return the matrices of a layer with all blends of a step in their slots; None if one is no product."""
        layer = self._layers.get(adapters)
        stale = [s for s in step.blends if layer is None or layer.keys.get(s) != self._keys[s]]
        products = {slot: _products(adapters, step.blends[slot]) for slot in stale}
        if None in products.values():
            return None
        if layer is None or not layer.fits(len(self._keys), products.values()):
            products = {slot: _products(adapters, blend) for slot, blend in step.blends.items()}
            if not any(products.values()):
                return None
            layer = self._layers[adapters] = _Layer(len(self._keys), products.values())
        for slot, own in products.items():
            layer.write(slot, own or ())
            layer.keys[slot] = self._keys[slot]
        layer.step = step
        return layer


Products = Sequence[tuple[LowRank, float]] | None
"""The products of a blend on a layer and their weights; None if it has another effect there."""


def _products(adapters: Modules, blend: Blend) -> Products:
    modules = [(adapters._modules[name], w) for name, w in blend if name in adapters._modules]
    if any(module.trained for module, _ in modules):
        return None
    products = [(module.low_rank(), w) for module, w in modules if not module.leaves_output]
    return None if any(product is None for product, _ in products) else products


class _Layer:
    """The slots of one layer: A (slots, rank, in) and B (slots, rank, out), zero beyond the rank of a blend."""

    def __init__(self, slots: int, blends: Iterable[Products]) -> None:
        products = [product for own in blends for product, _ in own or ()]
        first = products[0]
        self.rank, self.dtype = _ranks(blends), wide_dtype(*(f for p in products for f in p[:2]))
        options: Any = {"dtype": self.dtype, "device": first.A.device}
        self.A = torch.zeros(slots, self.rank, first.A.shape[1], **options)
        self.B = torch.zeros(slots, self.rank, len(first.B), **options)
        self.keys: dict[int, Key | None] = {}
        self.step: Step | None = None

    def fits(self, slots: int, blends: Collection[Products]) -> bool:
        """Return whether there are as many slots, and large and wide enough ones for these blends."""
        factors = [factor for own in blends for product, _ in own or () for factor in product[:2]]
        wide = wide_dtype(self.A, *factors)
        return slots <= len(self.A) and _ranks(blends) <= self.rank and wide == self.dtype

    def write(self, slot: int, products: Sequence[tuple[LowRank, float]]) -> None:
        """Copy the products of a blend into a slot."""
        A, B = self.A[slot].zero_(), self.B[slot].zero_()
        start = 0
        for product, weight in products:
            rows = slice(start, start + len(product.A))
            A[rows].copy_(product.A).mul_(weight * product.scaling)
            B[rows].copy_(product.B.T)
            start = rows.stop


def _ranks(blends: Iterable[Products]) -> int:
    """Return the largest sum of ranks of a blend."""
    return max((sum(len(product.A) for product, _ in own or ()) for own in blends), default=0)
