"""Decoding steps: a few tokens without gradients, with the same adapters for the whole batch.

In such a step the overhead of each operation exceeds its arithmetic. So layers that read the same input (q, k and v;
gate and up) share two products: with their A stacked, and with their B as one block-diagonal matrix. The first step
of a generation records which layers these are. Later steps use the stacks while no tensor of an adapter changes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import Cache

from lorakit.adapters.choice import Choice
from lorakit.methods.module import LowRank
from lorakit.ops.autocast import wide_dtype

FEW_TOKENS = 32
"""The most tokens of a decoding step. More are faster in the dtype of the base than in that of the stacks."""

LARGEST_B = 2**17
"""The most elements of a block-diagonal B with several blocks: reading its zeros must cost less than it saves."""

Products = dict[nn.Module, list[LowRank]]
"""What the adapters of each layer add to its output."""

_INPUTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


class Decoding:
    """The decoding steps of one model."""

    def __init__(self) -> None:
        self._recording: Step | None = None
        self._stacks: Stacks | None = None

    def begin(self, choice: Choice, args: tuple, kwargs: dict[str, Any]) -> Step | None:
        """Return the decoding step that a forward pass with these arguments is, or None.

        Any other pass discards the stacks. So an edit through `tensor.data`, which PyTorch does not count, acts from
        the next prompt on.
        """
        recorded, self._recording = self._recording, None
        if torch.is_grad_enabled() or not choice.names or not _continues(args, kwargs):
            self._stacks = None
            return None
        if recorded is not None and recorded.choice is choice:
            self._stacks = Stacks(recorded)
        if self._stacks is not None and self._stacks.are_current(choice):
            return Step(choice, self._stacks.inputs)
        self._stacks, self._recording = None, Step(choice)
        return self._recording


class Call(NamedTuple):
    """A recorded call of an adapted layer."""

    adapters: nn.Module
    number: int
    """The number of its input. Successive calls that read the same tensor have the same one."""
    dtype: torch.dtype
    """Dtype of its input."""


class Step:
    """One decoding step.

    A layer is known by its child module `adapters`.

    Args:
        choice: The adapters that act.
        inputs: The input that each layer reads. None records the calls instead.
    """

    def __init__(self, choice: Choice, inputs: dict[nn.Module, SharedInput] | None = None) -> None:
        self.choice = choice
        self.calls: list[Call] = []
        self._inputs = inputs
        self._shared: SharedInput | None = None
        self._x: Tensor | None = None
        self._version = 0
        self._deltas: dict[nn.Module, Tensor] = {}

    def adapt(self, adapters: nn.Module, x: Tensor, output: Tensor) -> Tensor | None:
        """Return the layer's output with the effect of its adapters; None if they are in no stack."""
        if self._inputs is None:
            self._record(adapters, x)
            return None
        shared = self._inputs.get(adapters)
        if shared is None or torch.is_grad_enabled() or x.is_inference():
            return None
        if x is not self._x or shared is not self._shared or x._version != self._version:
            self._deltas = shared.deltas(x, output.dtype)
            self._shared, self._x, self._version = shared, x, x._version
        return output + self._deltas[adapters]

    def _record(self, adapters: nn.Module, x: Any) -> None:
        if isinstance(x, Tensor):
            number = self.calls[-1].number + (x is not self._x) if self.calls else 0
            self.calls.append(Call(adapters, number, x.dtype))
            self._x = x


class Stacks:
    """The stacks of the layers that a recorded step called."""

    def __init__(self, recorded: Step) -> None:
        _Optimizers.watch()
        self._choice = recorded.choice
        self._modules: list[tuple[dict[str, Any], str]] = []
        self.inputs: dict[nn.Module, SharedInput] = {}
        for products, dtype in self._with_equal_input(list(recorded.calls)):
            self.inputs |= dict.fromkeys(products, SharedInput(products, dtype))
        self._state = self._current_state()
        # Nothing else can have the identity of a module that is kept, or the address of a tensor.
        modules = [owner[name] for owner, name in self._modules]
        self._kept = [*modules, *(t.detach() for t in _tensors(modules))]

    def _with_equal_input(self, calls: list[Call]) -> list[tuple[Products, torch.dtype]]:
        """Return the products of the layers, in groups that can share two products, with the dtype of the input."""
        groups: list[tuple[Products, torch.dtype]] = []
        read = None
        for adapters, number, dtype in calls:
            own = self._products(adapters)
            if not own:
                continue
            if number == read and _size_of_B({**groups[-1][0], adapters: own}) <= LARGEST_B:
                groups[-1][0][adapters] = own
            else:
                groups.append(({adapters: own}, dtype))
            read = number
        return groups

    def _products(self, adapters: nn.Module) -> list[LowRank]:
        """Return what a layer's adapters add, each scaled by its weight; nothing if they do more than that."""
        products = []
        for name, weight in self._choice.blends[0]:
            module: Any = adapters._modules.get(name)
            if module is None or module.leaves_output:
                continue
            product = module.low_rank()
            if product is None or not all(map(_is_plain, _tensors([module]))):
                return []
            products.append(product._replace(scaling=weight * product.scaling))
            self._modules.append((adapters._modules, name))
        return products

    def _current_state(self) -> Any:
        """Return what differs after any change on which the stacks depend; None if an adapter was removed."""
        modules: list[Any] = [owner.get(name) for owner, name in self._modules]
        if None in modules:
            return None
        tensors = _tensors(modules)
        return (
            _Optimizers.steps,
            [(id(m), m.training, m.scaling, m.dropout) for m in modules],
            [*map(id, tensors)],
            [t._version for t in tensors],
            [t.data_ptr() for t in tensors],
        )

    def are_current(self, choice: Choice) -> bool:
        """Return whether the same adapters act with the same tensors."""
        return choice is self._choice and self._state == self._current_state()


class SharedInput:
    """The low-rank products of layers that read the same input, as two products.

    Args:
        products: Those of each layer.
        dtype: Dtype of the input.
    """

    def __init__(self, products: Products, dtype: torch.dtype) -> None:
        every = [product for own in products.values() for product in own]
        wide = wide_dtype(*(tensor for A, B, _ in every for tensor in (A, B)))
        wide = torch.promote_types(wide, dtype)
        self._A = torch.cat([A.detach().to(wide) * scaling for A, _, scaling in every])
        blocks = [torch.cat([B.detach() for _, B, _ in own], 1) for own in products.values()]
        self._B = torch.block_diag(*blocks).to(wide)
        self._widths = [len(block) for block in blocks]
        self._layers = list(products)

    def deltas(self, x: Tensor, dtype: torch.dtype) -> dict[nn.Module, Tensor]:
        """Return what is added to the output of each layer, for an input (..., in)."""
        total = F.linear(F.linear(x.to(self._A.dtype), self._A), self._B).to(dtype)
        if len(self._layers) == 1:
            return {self._layers[0]: total}
        return dict(zip(self._layers, total.split(self._widths, dim=-1), strict=True))


class _Optimizers:
    """The number of steps of all optimizers, because a fused one writes without a new `_version`."""

    steps = 0

    @staticmethod
    @functools.cache
    def watch() -> None:
        """Count from the first call on."""
        register_optimizer_step_post_hook(_Optimizers._count)

    @classmethod
    def _count(cls, *_: object) -> None:
        cls.steps += 1


def _tensors(modules: Iterable[Any]) -> list[Tensor]:
    """Return the tensors of adapter modules."""
    every = (t for m in modules for t in (*m._parameters.values(), *m._buffers.values()))
    return [t for t in every if t is not None]


def _is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is whole outside its layer's call (FSDP's are not), and counts its versions."""
    whole = type(tensor) in (Tensor, nn.Parameter) and tensor.untyped_storage().size() > 0
    return whole and not tensor.is_inference()


def _size_of_B(products: Products) -> int:  # noqa: N802
    """Return the number of elements of the block-diagonal B of several layers."""
    shapes = [[B.shape for _, B, _ in own] for own in products.values()]
    return sum(own[0][0] for own in shapes) * sum(rank for own in shapes for _, rank in own)


def _continues(args: tuple, kwargs: dict[str, Any]) -> bool:
    """Return whether a forward pass continues earlier ones by a few tokens, without autocast."""
    cache = next((value for value in kwargs.values() if isinstance(value, Cache)), None)
    x = next((kwargs[name] for name in _INPUTS if kwargs.get(name) is not None), None)
    x = args[0] if x is None and args else x
    return (
        cache is not None
        and isinstance(x, Tensor)
        and x.shape[:2].numel() <= FEW_TOKENS
        and not torch.is_autocast_enabled(x.device.type)
        and bool(cache.get_seq_length() > 0)
    )
