"""Different adapters in one batch: each layer computes every adapter on its own rows or tokens.

Rows and tokens are selected, never masked, so NaN of one adapter stays in its rows. For linear layers the
low-rank products are one operation (`ops.lora_segments`).
"""

from __future__ import annotations

from collections.abc import Iterable, KeysView, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils.parametrize import is_parametrized
from transformers.pytorch_utils import Conv1D

from lorakit.adapters.activation import Activation
from lorakit.adapters.choice import Blend, Choice, Entries, put, take
from lorakit.adapters.passes import Pass
from lorakit.adapters.row_layout import RowLayout
from lorakit.errors import AdapterStateError
from lorakit.methods.lora.layer import LoRALayer
from lorakit.methods.lora.linear import output_is_unshared
from lorakit.methods.module import AdapterModule
from lorakit.models.parameter_swaps import with_parameters
from lorakit.ops.lora_segments import Segment, lora_segments


class MixableAdapters(Protocol):
    """What this module uses of `LayerAdapters`, whose import would be circular."""

    activation: Activation
    layout: RowLayout
    replaced: dict[str, nn.Parameter]

    @property
    def hides_parameters(self) -> bool: ...
    def __getitem__(self, key: str) -> AdapterModule: ...
    def __contains__(self, key: str) -> bool: ...
    def keys(self) -> KeysView[str]: ...
    def parameters_to_swap(self, layer: nn.Module, blend: Blend) -> dict[str, Tensor]: ...
    def changes(self, layer: nn.Module, blend: Blend) -> bool: ...
    def shadows(self, layer: nn.Module, blend: Blend) -> dict[str, Tensor]: ...


class Call(NamedTuple):
    """A call of a layer."""

    layer: nn.Module
    x: Tensor
    """The input that the adapters read."""
    args: tuple = ()
    kwargs: Mapping[str, Any] = {}

    def at(self, entries: Entries) -> Call:
        """Return the call with some entries of the first axis of every tensor."""
        x = take(self.x, entries)

        def part(value: Any) -> Any:
            if value is self.x:
                return x
            return take(value, entries) if isinstance(value, Tensor) else value

        args = tuple(map(part, self.args))
        return Call(self.layer, x, args, {name: part(v) for name, v in self.kwargs.items()})

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


def adapt_by_part(adapters: MixableAdapters, call: Call, output: Any, of_pass: Pass) -> Any:
    """Return a layer's output, with the adapters of each row or token on that row or token.

    Raises:
        AdapterStateError: The layer may not see whole rows in order, an adapter mixes the tokens of a row, or trained
            copies cannot be used in this layer for some rows only.
    """
    choice, layer, x = of_pass.choice, call.layer, call.x
    acting = choice.names & adapters.keys()
    if not (acting or adapters.replaced):
        return output
    for name, value in (("input", x), ("output", output)):
        if not isinstance(value, Tensor):
            raise adapters.layout.refuse(f"its {name} is a {type(value).__name__}")
    if not x.numel():
        return output
    if choice.whole is not None and (choice.unit == "batch" or of_pass.batch is not None):
        return _adapt(adapters, call, x, output, choice.whole)  # rows were counted on entry
    axes = x.ndim - _features(layer)
    size = adapters.layout.checked_size(x, of_pass, axes=axes)
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
        return _adapt_parts(adapters, call, x, output, of_pass).view(shape)
    axis = adapters.layout.axis
    if axis == 0 and axes > 1 and x.shape[0] != x.shape[1] and not adapters.layout.is_known:
        adapters.layout = replace(adapters.layout, is_known=True)  # also in later square batches
    if axis == 0:
        return _adapt_parts(adapters, call, x, output, of_pass)
    x, output = x.transpose(0, axis), output.transpose(0, axis)
    return _adapt_parts(adapters, call, x, output, of_pass).transpose(0, axis)


def why_not_by_token(
    layer: nn.Module, layout: RowLayout, module: AdapterModule | None, trained: Iterable[str]
) -> str | None:
    """Return why a choice by token cannot use an adapter on a layer, or None if it can.

    The adapter adds `module`, if it is not None, to the layer's output, and trains copies of the layer's attributes
    `trained`.

    A forward pass may refuse more: a layer that sees another number of tokens than the batch has, such as the pooler of
    an encoder, which sees the first token of each row.
    """
    if layout.refused is not None:
        return layout.refused
    if layout.axis != 0:
        return "it is sequence-first"
    if layout.is_table:
        return "its input is not known to be an input of the model"
    shadows = module is not None and module.shadows and not module.splits
    if shadows or isinstance(layer, nn.MultiheadAttention):
        return "the model reads its weights directly"
    if module is not None:
        has_hooks = module.layer_hooks or module.backbone_hooks
        if has_hooks or not (module.by_token or module.leaves_output):
            return "the adapter there may mix the tokens of a sequence"
    trained = dict.fromkeys(trained)
    if trained and not _computes_by_token(layer):
        return f"the adapter trains it in full, and a {type(layer).__name__} may mix the tokens of a sequence"
    return _why_not_computed_again(layer, trained) if trained else None


def _adapt_parts(
    adapters: MixableAdapters, call: Call, x: Tensor, output: Tensor, of_pass: Pass
) -> Tensor:
    """Apply each part of a choice to its entries of the first axis of `x` and `output`."""
    segments = _segments(adapters, x, of_pass)
    if segments is not None:
        in_place = (
            not torch.compiler.is_compiling()
            and output.is_contiguous()
            and not output._is_view()
            and output_is_unshared(call.layer)
        )
        flat = output.flatten(0, -2)
        return lora_segments(x.flatten(0, -2), flat, segments, in_place=in_place).view(output.shape)
    for blend, entries in of_pass.parts(len(x), x.device):
        if not adapters.changes(call.layer, blend):
            continue
        own = take(x, entries)
        parameters = adapters.parameters_to_swap(call.layer, blend)
        parameters |= adapters.shadows(call.layer, blend)
        if not parameters:
            rows = _add(adapters, call.layer, own, take(output, entries), blend)
        elif adapters.hides_parameters:
            part = call.at(entries)
            rows = _computed_again(adapters, part, part.x, blend, parameters)
        else:
            rows = _computed_again(adapters, call, own, blend, parameters)
        output = put(output, entries, rows)
    return output


def _segments(adapters: MixableAdapters, x: Tensor, of_pass: Pass) -> list[Segment] | None:
    """Return the low-rank products of a choice; None if an adapter has another effect on the layer."""
    if adapters.replaced:
        return None
    low_rank = {}
    for name in of_pass.choice.names & adapters.keys():
        module = adapters[name]
        product = module.low_rank()
        if product is None or module.trained:
            return None
        low_rank[name] = product
    return [
        Segment(tokens, low_rank[name].A, low_rank[name].B, weight * low_rank[name].scaling)
        for blend, tokens in of_pass.parts(x.shape[:-1].numel(), x.device)
        for name, weight in blend
        if name in low_rank
    ]


def _adapt(
    adapters: MixableAdapters, call: Call, x: Tensor, output: Tensor, blend: Blend
) -> Tensor:
    """Return `output`, the layer's output for `x`, with the effect of a blend for the whole batch."""
    parameters = adapters.parameters_to_swap(call.layer, blend)
    if not parameters or adapters.hides_parameters:
        return _add(adapters, call.layer, x, output, blend)
    return _computed_again(adapters, call, x, blend, parameters)


def _computed_again(
    adapters: MixableAdapters, call: Call, x: Tensor, blend: Blend, parameters: Mapping[str, Tensor]
) -> Tensor:
    """Return the layer's output for `x` with other parameters and with the effect of one blend."""
    if reason := _why_not_computed_again(call.layer, parameters):
        raise adapters.layout.refuse(reason)
    args, kwargs = call.with_input(x)
    inside = Pass(Choice((blend,)), is_part=True)  # for the layers inside this one
    with with_parameters(call.layer, parameters) as layer:
        with adapters.activation.part(inside):
            output = layer.forward(*args, **kwargs)
        if not isinstance(output, Tensor):
            raise adapters.layout.refuse(f"its output is a {type(output).__name__}")
        return _add(adapters, layer, x, output, blend)


def _add(
    adapters: MixableAdapters, layer: nn.Module, x: Tensor, output: Tensor, blend: Blend
) -> Tensor:
    """Return `output` with the effects of a blend on a layer that has the blend's parameters."""
    for name, weight in blend:
        if name in adapters and not adapters[name].shadows:
            output = adapt_by(adapters[name], adapters.activation, layer, x, output, weight)
    return output


def adapt_by(
    module: AdapterModule,
    activation: Activation,
    layer: nn.Module,
    x: Any,
    output: Any,
    weight: float,
) -> Any:
    """Return `AdapterModule.adapt`, with the factors of DoRA's rows that the model keeps."""
    if not module.scales and isinstance(module, LoRALayer) and module.magnitude is not None:
        known = activation.row_factors
        if known is not None:
            return known.adapt(module, layer, x, output, weight)
    return module.adapt(layer, x, output, weight)


def _why_not_computed_again(layer: nn.Module, parameters: Mapping[str, Any]) -> str | None:
    """Return why the layer's forward with other parameters may differ from a call of the layer; None if it cannot."""
    hooks = (
        *layer._forward_pre_hooks.values(),
        *layer._forward_hooks.values(),
        *torch_module._global_forward_pre_hooks.values(),
        *torch_module._global_forward_hooks.values(),
    )
    for hook in hooks:
        if not (getattr(hook, "__module__", None) or "").startswith("lorakit."):
            return f"its hook {getattr(hook, '__qualname__', repr(hook))} would not run for rows with trained copies"
    if not parameters.keys() <= layer._parameters.keys() or is_parametrized(layer):
        return "its parameters are computed from other tensors"
    return None


def _computes_by_token(layer: nn.Module) -> bool:
    """Return whether the layer is of a type that computes each token on its own."""
    known = (nn.Linear, Conv1D, nn.Embedding, nn.LayerNorm)
    return isinstance(layer, known) or type(layer).__name__.endswith("RMSNorm")


def _features(layer: nn.Module) -> int:
    """Return how many of the last axes of the layer's input are not batch or length."""
    if isinstance(layer, nn.Embedding):
        return 0
    return layer.weight.ndim - 1 if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else 1
