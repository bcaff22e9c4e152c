"""The kinds of layers that can have adapters, the row slices of fused projections, and stacked experts."""

from __future__ import annotations

import functools
import inspect
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit.models.dtypes import FLOATS
from lorakit.ops.seeding import seeded

ADAPTERS = "adapters"
"""Name of the child module that holds a layer's adapters (``<layer>.adapters.<name>``)."""


_INPUT_NAMES = ("input", "x", "hidden_states", "hidden", "inputs", "input_ids")
"""Names of the parameter that takes a layer's input: in PyTorch, in transformers, and in common use."""

FORWARDS: dict[type[nn.Module], Callable[..., Tensor]] = {
    kind: kind.forward
    for kind in (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
}
"""The forward method of each layer type whose formula is known."""

_INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
"""Dtypes in which quantisation libraries pack numbers."""

_LARGE = 30.0
"""Factor on all trial samples but the first, so that a bound on the output (a clamp) shows."""

F = TypeVar("F", bound=Callable[..., Any])


def by_token(hook: F) -> F:
    """Mark a hook that mixes no tokens: its output for a token depends on no other token."""
    setattr(hook, "by_token", True)  # noqa: B010, type checkers reject new attributes of functions
    return hook


class AdapterSlot(nn.ModuleDict):
    """The child module that holds a layer's adapters by name; not part of the base."""


class StackedWeight(nn.Module):
    """One stacked weight of the experts of a mixture, as a layer: (experts, out, in), or (experts, in, out).

    The experts' module reads such weights without calling a layer. So this one is not in the model's tree: `walk` and
    `submodule` make it, with the weight's name as its path.
    """

    def __init__(self, experts: nn.Module, name: str) -> None:
        super().__init__()
        self.__dict__.update(experts=experts, name=name)  # not as a child

    experts: nn.Module
    name: str

    @property
    def weight(self) -> Tensor:
        """The parameter of the experts' module, or the tensor that hides it."""
        return getattr(self.experts, self.name)

    @property
    def is_declared(self) -> bool:
        """Whether the experts' class says how it stores its weights."""
        return hasattr(self.experts, "is_transposed")

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored as (experts, in, out); if its class does not say it, PEFT assumes that not."""
        return bool(getattr(self.experts, "is_transposed", False))


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSlice:
    """The output rows of one projection inside a fused one.

    The rows are ``{g * stride + offset + j : 0 <= g < groups, 0 <= j < width}``. A contiguous
    slice has one group and the whole output as its stride; an interleaved one (GPT-NeoX, BLOOM)
    has a group for each head.
    """

    groups: int
    stride: int
    offset: int
    width: int

    def __post_init__(self) -> None:
        """Reject a slice that exceeds its group: its last rows would belong to the next group."""
        inside = self.offset >= 0 and self.offset + self.width <= self.stride
        if self.groups < 1 or self.width < 1 or not inside:
            raise ValueError(f"{self!r} does not lie within its stride")

    @property
    def total(self) -> int:
        """Number of rows."""
        return self.groups * self.width

    def rows(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return the row indices, ascending: int64, shape ``(total,)``. Made on `device`: a copy would wait for it."""
        starts = torch.arange(self.groups, device=device) * self.stride + self.offset
        return (starts[:, None] + torch.arange(self.width, device=device)).flatten()

    def __str__(self) -> str:
        last = self.offset + self.width
        if self.groups == 1:
            return f"rows {self.offset}:{last}"
        return f"rows {self.offset}:{last} of every {self.stride}"


def why_not_adaptable(layer: nn.Module) -> str | None:
    """Return why ``layer`` cannot have an adapter, or None if it can.

    Adaptable layers are ``nn.Linear``, GPT-2's ``Conv1D``, ``nn.Embedding``, ``nn.Conv1d/2d/3d``
    (with their subclasses), ``nn.MultiheadAttention`` and packed linear layers (`is_packed_linear`).
    """
    if isinstance(layer, nn.MultiheadAttention):
        if layer.in_proj_weight is None:
            return "it keeps q, k and v in three weights because kdim or vdim differ from embed_dim"
        return None
    if isinstance(layer, nn.Embedding):
        # A scaled embedding (Gemma, BART) still looks up its input. Other overrides, such as OPT's
        # learned positions, compute their own indices, so the layer's input does not name the rows.
        overrides = type(layer).forward is not nn.Embedding.forward
        if overrides and not hasattr(layer, "embed_scale"):
            return "it computes its own indices instead of looking up its input"
        if layer.max_norm is not None:
            return "it renormalises its rows (max_norm), so no table equals its output plus the adapter's"
        return None
    if isinstance(layer, (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return _why_not_added_to(layer)
    if isinstance(layer, StackedWeight) or is_packed_linear(layer):
        return None
    return "it is neither a linear, embedding or convolution layer nor an nn.MultiheadAttention"


@torch.no_grad()
def _why_not_added_to(layer: nn.Module) -> str | None:
    """Return why an adapter cannot add to the output of ``layer``, or None if it can or a trial fails.

    A forward method that is not its type's own is tried on the meta device, which shows only shapes.
    """
    kind = kind_of_formula(layer)
    if kind is None or type(layer).forward is FORWARDS[kind]:
        return None
    if layer.weight.dtype not in FLOATS:  # type: ignore[union-attr]
        return None  # a quantised weight has the shape of its storage
    with seeded(0):
        try:
            copy = copy_of(layer, device="meta")
            copy.__dict__.pop("forward", None)  # a hook of accelerate, which can move weights
            # Many samples and rows, which a layer may split into groups. Without values they cost nothing.
            x = trial_input(copy, samples=64)
            output = call_forward(copy, x)
            expected = FORWARDS[kind](copy, x)
        except Exception:
            return None
    if isinstance(output, tuple):
        output, *others = output
        # The layers of Megatron return their bias beside the output.
        if not {id(other) for other in others} <= {id(None), *map(id, copy.parameters())}:
            return "it returns several tensors, and an adapter would change only the first"
    if isinstance(output, Tensor) and output.shape == expected.shape:
        return None
    return f"its output does not have the shape that {kind.__name__} returns, so an adapter cannot add to it"


def kind_of_formula(layer: nn.Module) -> type[nn.Module] | None:
    """Return the type of ``layer`` whose formula is known, or None."""
    return next((kind for kind in FORWARDS if isinstance(layer, kind)), None)


def trial_input(layer: Any, samples: int = 2) -> Tensor:
    """Return random input: (samples, samples, in), (samples, in, *size) for convolutions, or ids (samples, 4)."""
    weight: Tensor = layer.weight
    dtype = weight.dtype if weight.is_floating_point() else torch.float32  # quantised
    if isinstance(layer, nn.Embedding):
        return torch.randint(layer.num_embeddings, (samples, 4), device=weight.device)
    if isinstance(layer, nn.Linear):
        shape = (samples, layer.in_features)
    elif isinstance(layer, Conv1D):
        shape = (samples, layer.nx)
    else:
        padding = max(layer._reversed_padding_repeated_twice)
        kernel = zip(layer.kernel_size, layer.dilation, strict=True)
        shape = (layer.in_channels, *(d * (k - 1) + 1 + padding for k, d in kernel))
    x = torch.randn(samples, *shape, device=weight.device, dtype=dtype)
    x[1:] *= _LARGE
    return x


def call_forward(layer: nn.Module, x: Tensor) -> Any:
    """Return the output of the layer's forward method, without its hooks."""
    position, name = input_parameter(type(layer))
    return layer.forward(x) if position == 0 else layer.forward(**{name: x})


def copy_of(layer: nn.Module, device: str | None = None) -> nn.Module:
    """Return a copy of a layer in evaluation mode, without adapters.

    It owns its buffers and shares its parameters, or has parameters and buffers without values on ``device``.
    """
    copy = type(layer).__new__(type(layer))
    parameters, buffers = dict(layer._parameters), dict(layer._buffers)
    for name, parameter in parameters.items():
        if parameter is not None and device is not None:
            parameters[name] = nn.Parameter(
                torch.empty_like(parameter, device=device), parameter.requires_grad
            )
    for name, buffer in buffers.items():
        if buffer is not None:
            buffers[name] = buffer.clone() if device is None else buffer.to(device)
    copy.__dict__.update(
        layer.__dict__,
        training=False,
        _parameters=parameters,
        _buffers=buffers,
        _modules={
            n: None if m is None else copy_of(m, device)
            for n, m in layer._modules.items()
            if n != ADAPTERS
        },
    )
    return copy


def is_stacked_experts(path: str, module: nn.Module) -> bool:
    """Whether a module is the experts of a mixture, with their weights in stacked tensors instead of layers."""
    is_named = "Expert" in type(module).__name__ or path.endswith("experts")
    return (
        is_named
        and kind_of_formula(module) is None
        and any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
    )


def stacked_weights(path: str, module: nn.Module) -> list[str]:
    """Return the names of a module's parameters that stack one matrix for each expert.

    There are none if it is not experts, or if their weights are quantised.
    """
    if not is_stacked_experts(path, module):
        return []
    stacked = {n: p for n, p in module._parameters.items() if p is not None and p.dim() > 2}
    is_plain = all(
        p.dim() == 3 and p.dtype in FLOATS and not packs_numbers(p) for p in stacked.values()
    )
    return list(stacked) if is_plain else []


def packs_numbers(tensor: Tensor) -> bool:
    """Whether a tensor is of a class of a quantisation library (torchao, quanto): one that unpacks its numbers."""
    return type(tensor).dequantize is not Tensor.dequantize


def type_name(layer: nn.Module) -> str:
    """Return the name of a layer's class for messages."""
    return type(layer.experts if isinstance(layer, StackedWeight) else layer).__name__


def is_linear(layer: nn.Module) -> bool:
    """Whether ``layer`` multiplies its input by a matrix (``nn.Linear``, ``Conv1D``, or a packed linear layer)."""
    return isinstance(layer, (nn.Linear, Conv1D)) or is_packed_linear(layer)


def is_packed_linear(layer: nn.Module) -> bool:
    """Whether ``layer`` is a linear layer of a quantisation library, with a class of its own (GPTQ, AWQ, HQQ).

    It has the two widths of an ``nn.Linear``, and packs its weight into tensors of integers.
    """
    widths = (getattr(layer, name, None) for name in ("in_features", "out_features"))
    if isinstance(layer, nn.Linear) or not all(isinstance(width, int) for width in widths):
        return False
    weight = layer._parameters.get("weight")
    own_tensors = (*layer._parameters.values(), *layer._buffers.values())
    return (weight is None or weight.dtype not in FLOATS) and any(
        t is not None and t.ndim > 0 and t.dtype in _INTEGERS for t in own_tensors
    )


def device_of(layer: nn.Module) -> torch.device:
    """Return the device of a layer's tensors, of which the first is its own if it has any."""
    owner = layer.experts if isinstance(layer, StackedWeight) else layer
    return next(itertools.chain(owner.parameters(), owner.buffers())).device


def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """Return the shape of an adaptable layer's weight, output rows first.

    (out, in) for linear layers, however they store it, (3 * embed, embed) for
    ``nn.MultiheadAttention``, (vocabulary, dim) for embeddings, (out, in / groups, *kernel) for
    convolutions, (experts, out, in) for stacked weights, however they are stored.
    """
    if isinstance(layer, Conv1D):
        return (layer.nf, layer.nx)
    if is_linear(layer):  # a quantised weight has the shape of its storage
        return (layer.out_features, layer.in_features)  # type: ignore[return-value]
    if isinstance(layer, nn.Embedding):
        return (layer.num_embeddings, layer.embedding_dim)
    if isinstance(layer, nn.MultiheadAttention):
        return (3 * layer.embed_dim, layer.embed_dim)
    if isinstance(layer, StackedWeight):
        return tuple((layer.weight.mT if layer.transposed else layer.weight).shape)
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    return (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)


@torch.compiler.assume_constant_result  # Dynamo traces neither `inspect` nor a cache
def input_parameter(kind: type[nn.Module]) -> tuple[int, str]:
    """Return position and name of the parameter of ``kind.forward`` that takes the layer's input.

    It is the first parameter with a usual name (``input``, ``x``, ``hidden_states``, ...), else the first of all. A
    forward method that passes on ``*args, **kwargs`` has the parameters of the method that it overrides.
    """
    return _find_input_parameter(kind)


@functools.cache
def _find_input_parameter(kind: type[nn.Module]) -> tuple[int, str]:
    for owner in kind.__mro__:
        if "forward" not in vars(owner):
            continue
        parameters = list(inspect.signature(vars(owner)["forward"]).parameters.values())[1:]
        names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if names:
            name = next((n for n in names if n in _INPUT_NAMES), names[0])
            is_positional = parameters[names.index(name)].kind is not inspect.Parameter.KEYWORD_ONLY
            return names.index(name) if is_positional else sys.maxsize, name
    return 0, "input"
