"""Record the allocations, products and memory traffic of a training step, operation by operation.

The step runs on PyTorch's fake tensors, which have a shape, a dtype and a device but no memory. A dispatch mode
intercepts every operation, so live memory is counted instead of estimated by formulas.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lorakit.planning.products import Operand, Product

Kind = Literal["activations", "gradients", "logits", "temporary"]
"""Purpose of a tensor: saved for the backward pass, gradient, as wide as the vocabulary, or anything else."""

KINDS: tuple[Kind, ...] = ("activations", "gradients", "logits", "temporary")

_ATEN = torch.ops.aten
_DEVICE = torch.ops.prim.device.default
_DRAWS = {"bernoulli": 1, "bernoulli_": 1, "native_dropout": 1, "random_": 4}
"""Operations that draw dropout masks, with the elements of the mask for each element of their result."""


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Return the operations of attention: the scores and the weighted values."""
    pairs = query.shape[:-1].numel() * key.shape[-2]
    return 2 * pairs * (query.shape[-1] + value.shape[-1])


def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> int:
    """Return the operations of attention's gradients, which compute the scores again."""
    pairs = query.shape[:-1].numel() * key.shape[-2]
    return 2 * pairs * (3 * query.shape[-1] + 2 * value.shape[-1])


# The kernel that fake tensors on the CPU run, also in a plan for a GPU. torch counts those of GPUs only.
_FUSED_ATTENTION = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
_FLOPS = {**flop_registry, _ATEN.addmm_: flop_registry[_ATEN.addmm], **_FUSED_ATTENTION}
"""Functions that count the floating-point operations of a product."""


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors among arguments or results of an operation, also those in lists."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found


@dataclass(slots=True)
class Work:
    """Work of a sequence of operations."""

    products: Counter[Product] = field(default_factory=Counter)
    """Matrix products (and convolutions), with the number of times that each is computed."""
    traffic: float = 0.0
    """Bytes that all other operations read and write."""
    drawn: float = 0.0
    """Random numbers of dropout."""
    calls: int = 0
    """Number of operations."""

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
        """Return the work of `factor` repetitions."""
        products = Counter({p: count * factor for p, count in self.products.items()})
        return Work(products, self.traffic * factor, self.drawn * factor, self.calls * factor)


@dataclass(slots=True)
class Segment:
    """The part of a step between two marks."""

    block: int | None
    """Index of the block that runs, in the forward or backward pass; None outside of blocks."""
    start: dict[Kind, int]
    """Bytes alive at its start."""
    peak: dict[Kind, int]
    """Bytes alive at its peak."""
    end: dict[Kind, int] = field(default_factory=dict)
    """Bytes alive at its end."""
    work: Work = field(default_factory=Work)
    widest: int = 0
    """Bytes of the largest matrix that one of its products reads."""


class Ledger(TorchDispatchMode):
    """Record every operation inside the block ``with ledger:``, in segments.

    Operations on ordinary tensors only (token ids, masks) are computed, so a step that branches on the content of its
    batch takes the same branch as in training.

    Args:
        known: Existing tensors, which are not counted.
        vocabulary: Width of the logits, to recognise them; 0 for none.
    """

    def __init__(self, known: Iterable[Tensor], vocabulary: int = 0) -> None:
        super().__init__()
        self.segments: list[Segment] = []
        self.repeated = 1
        """Number of times that the next operations are computed in training."""
        self._vocabulary = vocabulary
        self._kind: dict[int, Kind | None] = {t.untyped_storage()._cdata: None for t in known}
        self._alive: dict[Kind, int] = dict.fromkeys(KINDS, 0)
        self.mark(None)

    # --- called by the step ----------------------------------------------------------------------

    def mark(self, block: int | None) -> None:
        """End the current segment and begin another."""
        self.close()
        self.segments.append(Segment(block, dict(self._alive), dict(self._alive)))

    def close(self) -> None:
        """End the last segment."""
        if self.segments:
            self.segments[-1].end = dict(self._alive)

    def set_kind(self, tensor: Tensor, kind: Kind) -> None:
        """Set the kind of a temporary tensor. Logits keep theirs."""
        storage = tensor.untyped_storage()
        before = self._kind.get(storage._cdata)
        if before is None or before == kind or before == "logits":
            return
        self._kind[storage._cdata] = kind
        self._alive[before] -= storage.nbytes()
        self._alive[kind] += storage.nbytes()

    def saved_tensors(self) -> torch.autograd.graph.saved_tensors_hooks:
        """Return a context that counts the tensors that autograd saves inside as activations."""

        def pack(tensor: Tensor) -> Tensor:
            if isinstance(tensor, FakeTensor):
                self.set_kind(tensor, "activations")
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)

    # --- called by PyTorch -----------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:  # a short cut for thousands of calls
            return args[0].fake_device
        kwargs = kwargs or {}
        inputs = [*_tensors(args), *_tensors(kwargs.values())]
        if inputs and not any(isinstance(x, FakeTensor) for x in inputs):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        result = func(*args, **kwargs)
        outputs = [x for x in _tensors((result,)) if isinstance(x, FakeTensor)]
        allocated = [self._count(x) for x in outputs]
        self._record_work(func, args, kwargs, inputs, outputs, result, any(allocated))
        return result

    def _count(self, tensor: FakeTensor) -> bool:
        """Count a tensor's memory until it is freed. Return whether its storage is new."""
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
            last_kind = self._kind.pop(key, None)
            if last_kind is not None:
                self._alive[last_kind] -= size

        weakref.finalize(storage, freed).atexit = False
        segment = self.segments[-1]
        if sum(self._alive.values()) > sum(segment.peak.values()):
            segment.peak = dict(self._alive)
        return True

    def _record_work(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        inputs: list[Tensor],
        outputs: list[FakeTensor],
        result: Any,
        allocates: bool,
    ) -> None:
        segment = self.segments[-1]
        segment.work.calls += self.repeated
        packet = func._overloadpacket
        name = packet.__name__
        moved = sum(x.nbytes for x in outputs)
        if packet in _FLOPS:
            # Without `kwargs`: its `out` is the result again.
            operands = [x for x in args if isinstance(x, Tensor)]
            operations = _FLOPS[packet](*args, **kwargs, out_val=result)
            moved += sum(x.nbytes for x in operands)
            product = Product(name, tuple(map(Operand.of, operands)), operations, moved)
            segment.work.products[product] += self.repeated
            if packet not in _FUSED_ATTENTION:  # its kernel reorders no matrix
                segment.widest = max(segment.widest, *(x.nbytes for x in inputs))
        elif name in _DRAWS:
            count = max(x.numel() for x in outputs)
            segment.work.drawn += self.repeated * _DRAWS[name] * count
        elif allocates or name.endswith("_"):  # a view moves no bytes
            segment.work.traffic += self.repeated * (sum(x.nbytes for x in inputs) + moved)
