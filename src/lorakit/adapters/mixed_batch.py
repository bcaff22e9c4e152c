"""Different adapters in one batch: each layer computes every adapter on its own rows or tokens.

Rows and tokens are selected, never masked, so NaN of one adapter stays in its rows. For linear layers the
low-rank products are one operation (`ops.lora_segments`).
"""

from __future__ import annotations

from collections.abc import KeysView, Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit.adapters.activation import Activation, Pass
from lorakit.adapters.choice import Blend, Choice, put, take
from lorakit.adapters.row_layout import RowLayout
from lorakit.errors import AdapterStateError
from lorakit.methods.lora.linear import output_is_unshared
from lorakit.methods.module import AdapterModule
from lorakit.models.parameter_swaps import call_with
from lorakit.ops.lora_segments import Segment, lora_segments

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Adapting(Protocol):
    """The adapters of one layer (`LayerAdapters`)."""

    activation: Activation
    layout: RowLayout
    replaced: dict[str, nn.Parameter]

    def __getitem__(self, key: str) -> AdapterModule: ...
    def __contains__(self, key: str) -> bool: ...
    def keys(self) -> KeysView[str]: ...
    def own_parameters(self, layer: nn.Module, blend: Blend) -> dict[str, Tensor]: ...
    def changes(self, layer: nn.Module, blend: Blend) -> bool: ...


class Call(NamedTuple):
    """A call of a layer."""

    layer: nn.Module
    x: Tensor
    """The input that the adapters read."""
    args: tuple = ()
    kwargs: Mapping[str, Any] = {}

    def with_input(self, x: Tensor) -> tuple[tuple, dict[str, Any]]:
        """Return the arguments with another input.

        Raises:
            AdapterStateError: Rows are selected, and another argument is a tensor whose rows are unknown.
        """
        others = [v for v in (*self.args, *self.kwargs.values()) if v is not self.x]
        if x is not self.x and any(isinstance(v, Tensor) for v in others):
            raise AdapterStateError(
                f"{type(self.layer).__name__} takes several tensors, so trained copies cannot be used for some rows "
                "only. Run one batch for each adapter."
            )
        args = tuple(x if v is self.x else v for v in self.args)
        return args, {name: x if v is self.x else v for name, v in self.kwargs.items()}


def adapt_by_part(adapters: Adapting, call: Call, output: Tensor, of_pass: Pass) -> Tensor:
    """Return a layer's output, with the adapters of each row or token on that row or token.

    Raises:
        AdapterStateError: The layer may not see whole rows in order, or an adapter mixes the tokens of a row.
    """
    choice, layer, x = of_pass.choice, call.layer, call.x
    acting = choice.names & adapters.keys()
    if not x.numel() or not (acting or adapters.replaced):
        return output
    if choice.unit == "batch":
        return _adapt(adapters, call, x, output, choice.whole or ())
    axes = x.ndim - _features(layer)
    size = adapters.layout.entries(x, of_pass, axes=axes)
    if choice.whole is not None:
        return _adapt(adapters, call, x, output, choice.whole)
    if choice.unit == "token":
        modules = [adapters[name] for name in acting]
        copies = adapters.replaced or any(module.trained for module in modules)
        by_token = all(module.by_token or module.leaves_output for module in modules)
        if not by_token or (copies and not _computes_by_token(layer)):
            raise adapters.layout.refuse("the adapters there may mix the tokens of a sequence")
        shape = output.shape
        x, output = x.reshape(size, *x.shape[axes:]), output.reshape(size, *shape[axes:])
        return _adapt_parts(adapters, call, x, output, choice).view(shape)
    axis = adapters.layout.axis
    if axis == 0:
        return _adapt_parts(adapters, call, x, output, choice)
    x, output = x.transpose(0, axis), output.transpose(0, axis)
    return _adapt_parts(adapters, call, x, output, choice).transpose(0, axis)


def _adapt_parts(
    adapters: Adapting, call: Call, x: Tensor, output: Tensor, choice: Choice
) -> Tensor:
    """Apply each part of a choice to its entries of the first axis of `x` and `output`."""
    segments = _segments(adapters, call.layer, x, choice)
    if segments is not None:
        is_plain = output.is_contiguous() and not output._is_view()
        in_place = is_plain and output_is_unshared(call.layer)
        flat = output.flatten(0, -2)
        return lora_segments(x.flatten(0, -2), flat, segments, in_place=in_place).view(output.shape)
    for blend, entries in choice.parts(len(x), x.device):
        if adapters.changes(call.layer, blend):
            rows = _adapt(adapters, call, take(x, entries), take(output, entries), blend)
            output = put(output, entries, rows)
    return output


def _segments(
    adapters: Adapting, layer: nn.Module, x: Tensor, choice: Choice
) -> list[Segment] | None:
    """Return the low-rank products of a choice; None if an adapter has another effect on the layer."""
    low_rank = {}
    for name in choice.names & adapters.keys():
        module = adapters[name]
        product = module.low_rank()
        if product is None or module.trained:
            return None
        low_rank[name] = product
    if adapters.replaced:
        return None
    return [
        Segment(tokens, low_rank[name].A, low_rank[name].B, weight * low_rank[name].scaling)
        for blend, tokens in choice.parts(x.shape[:-1].numel(), x.device)
        for name, weight in blend
        if name in low_rank
    ]


def _adapt(adapters: Adapting, call: Call, x: Tensor, output: Tensor, blend: Blend) -> Tensor:
    """Return `output`, the layer's output for `x`, with the effect of one blend."""
    parameters = adapters.own_parameters(call.layer, blend)
    if parameters:
        args, kwargs = call.with_input(x)
        inside = Pass(Choice((blend,)), is_part=True)  # for the layers inside this one
        with adapters.activation.part(inside):
            output = call_with(call.layer, parameters, *args, **kwargs)
            output = output[0] if isinstance(output, tuple) else output
    for name, weight in blend:
        if name in adapters and not adapters[name].shadows:
            output = adapters[name].adapt(call.layer, x, output, weight)
    return output


def _computes_by_token(layer: nn.Module) -> bool:
    """Return whether the layer is of a type that computes each token on its own."""
    known = (nn.Linear, Conv1D, nn.Embedding, nn.LayerNorm)
    return isinstance(layer, known) or type(layer).__name__.endswith("RMSNorm")


def _features(layer: nn.Module) -> int:
    """Return how many of the last axes of the layer's input are not batch or length."""
    if isinstance(layer, nn.Embedding):
        return 0
    return layer.weight.ndim - 1 if isinstance(layer, _CONVOLUTIONS) else 1
