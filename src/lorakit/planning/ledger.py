"""What a step allocates, frees and multiplies, noted operation by operation on tensors without numbers.

A training step runs as it is, on PyTorch's fake tensors: they have shapes, dtypes and a device, and no memory.
Every operation passes through here, so what is alive at each moment is counted and not guessed from formulas.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lorakit.planning.products import CALLS, Operand, Product

Kind = Literal["activations", "gradients", "logits", "temporary"]
"""What a tensor is there for: the backward pass, the optimizer, the vocabulary, or the operation in hand."""

KINDS: tuple[Kind, ...] = ("activations", "gradients", "logits", "temporary")

_DEVICE = torch.ops.prim.device.default
_DRAWS = ("bernoulli", "bernoulli_", "native_dropout")


@dataclass(slots=True)
class Work:
    """What operations cost time for."""

    products: Counter[Product] = field(default_factory=Counter)
    """Matrix products (and convolutions): how many there are of each."""
    traffic: float = 0.0
    """Bytes that all other operations read and write."""
    drawn: float = 0.0
    """Random decisions of dropout."""
    calls: int = 0
    """Operations."""

    @property
    def operations(self) -> float:
        """Floating-point operations of the products."""
        return sum(p.operations * count for p, count in self.products.items())

    def __iadd__(self, other: Work) -> Work:
        self.products.update(other.products)
        self.traffic += other.traffic
        self.drawn += other.drawn
        self.calls += other.calls
        return self

    def times(self, factor: int) -> Work:
        """The same `factor` times over."""
        products = Counter({p: count * factor for p, count in self.products.items()})
        return Work(products, self.traffic * factor, self.drawn * factor, self.calls * factor)


@dataclass(slots=True)
class Segment:
    """A stretch of a step, from one mark to the next."""

    name: str
    start: dict[Kind, int]
    """Bytes alive at its start."""
    peak: dict[Kind, int]
    """Bytes alive at its fullest moment."""
    end: dict[Kind, int] = field(default_factory=dict)
    """Bytes alive at its end."""
    work: Work = field(default_factory=Work)
    widest: int = 0
    """Bytes of the largest matrix that a product of it reads."""

    @property
    def growth(self) -> dict[Kind, int]:
        """Bytes that it leaves behind, or has freed."""
        return {kind: self.end[kind] - self.start[kind] for kind in KINDS}


class Ledger(TorchDispatchMode):
    """Notes every operation inside the block ``with ledger:``, in segments.

    Operations on ordinary tensors alone (token ids, masks) are carried out for real, so that whatever a step
    decides by its batch's content is decided as in training.

    Args:
        known: Tensors that were there before, and are not counted.
        vocabulary: Width by which logits are told from other tensors; 0 for none.
    """

    def __init__(self, known: Iterable[Tensor], vocabulary: int = 0) -> None:
        super().__init__()
        self.segments: list[Segment] = []
        self._vocabulary = vocabulary
        self._kind: dict[int, Kind | None] = {t.untyped_storage()._cdata: None for t in known}
        self._alive: dict[Kind, int] = dict.fromkeys(KINDS, 0)
        self.mark("start")

    # --- what the step tells ---------------------------------------------------------------------

    def mark(self, name: str) -> None:
        """End the segment in hand and begin another."""
        self.close()
        self.segments.append(Segment(name, dict(self._alive), dict(self._alive)))

    def close(self) -> None:
        """End the last segment."""
        if self.segments:
            self.segments[-1].end = dict(self._alive)

    def note(self, tensor: Tensor, kind: Kind) -> None:
        """Say what a tensor is there for, once that is known."""
        storage = tensor.untyped_storage()
        before = self._kind.get(storage._cdata)
        if before is None or before == kind or before == "logits":
            return
        self._kind[storage._cdata] = kind
        self._alive[before] -= storage.nbytes()
        self._alive[kind] += storage.nbytes()

    @contextmanager
    def saved_tensors(self) -> Iterator[None]:
        """Note what is saved for the backward pass inside this block."""

        def pack(tensor: Tensor) -> Tensor:
            if isinstance(tensor, FakeTensor):
                self.note(tensor, "activations")
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    # --- what PyTorch tells ----------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:  # asked for thousands of times
            return args[0].fake_device
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if given and not any(isinstance(x, FakeTensor) for x in given):
            with unset_fake_temporarily():
                return func(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(out) if isinstance(x, FakeTensor)]
        fresh = [self._count(x) for x in made]
        self._note_work(func, args, kwargs or {}, given, made, out, any(fresh))
        return out

    def _count(self, tensor: FakeTensor) -> bool:
        """Count a tensor's memory until it is freed; return whether it is new."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._kind:
            return False
        kind: Kind = "temporary"
        if self._vocabulary and tensor.ndim and tensor.shape[-1] == self._vocabulary:
            kind = "logits"
        self._kind[key] = kind
        self._alive[kind] += size

        def freed() -> None:
            now = self._kind.pop(key, None)
            if now is not None:
                self._alive[now] -= size

        weakref.finalize(storage, freed)
        segment = self.segments[-1]
        if sum(self._alive.values()) > sum(segment.peak.values()):
            segment.peak = dict(self._alive)
        return True

    def _note_work(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        given: list[Tensor],
        made: list[Any],
        out: Any,
        fresh: bool,
    ) -> None:
        segment = self.segments[-1]
        segment.work.calls += 1
        packet = func._overloadpacket
        name = packet.__name__
        if name in CALLS or packet in flop_registry:
            # Not from `kwargs`: what is written into there is the result once more.
            factors = [x for x in args if isinstance(x, Tensor)]
            operations = _operations(packet, args, kwargs, out)
            moved = sum(map(_bytes, factors)) + sum(map(_bytes, made))
            product = Product(name, tuple(map(Operand.of, factors)), operations, moved)
            segment.work.products[product] += 1
            segment.widest = max(segment.widest, *(_bytes(x) for x in given))
        elif name in _DRAWS:
            segment.work.drawn += max(x.numel() for x in made)
        elif fresh or name.endswith("_") or name in ("copy_", "fill_"):
            # A view moves nothing.
            segment.work.traffic += sum(map(_bytes, given)) + sum(map(_bytes, made))


def _operations(packet: Any, args: Any, kwargs: Any, out: Any) -> float:
    if packet in flop_registry:
        return flop_registry[packet](*args, **kwargs, out_val=out)
    rows, inner = args[1].shape  # addmm_
    return 2 * rows * inner * args[2].shape[-1]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
