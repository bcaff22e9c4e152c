"""The post-condition of a merge: a merged layer computes what the adapted one computes.

An adapter adds to a layer's output, and a merge adds to its weight. Both agree only if the layer computes its type's
formula, such as ``W x + b``, and if the adapter defines its effect as a weight. So each layer is called three times on
a small random input: with its base weights, with the adapter, and with the merged weights before they are rounded.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from lorakit.adapters.activation import Activation
from lorakit.adapters.choice import Blend, Choice
from lorakit.adapters.layer_adapters import LayerAdapters
from lorakit.errors import AdapterStateError
from lorakit.models.layers import (
    StackedWeight,
    input_parameter,
    kind_of_formula,
    stacked_weights,
    trial_input,
    weight_shape,
)
from lorakit.models.quantised import quantised_weight
from lorakit.ops.autocast import no_autocast, wide_dtype
from lorakit.ops.seeding import seeded

SHARE = 0.01
"""Largest difference relative to the adapter's own contribution to the output."""

ROUNDING = {"cpu": 1e-5}
"""Rounding of the output relative to its largest number; on other devices products may be in TF32."""

TOKENS = 4
"""Tokens of the input for experts."""


def require_equal(
    path: str, layer: nn.Module, adapters: LayerAdapters, blend: Blend, merged: Mapping[str, Tensor]
) -> None:
    """Check on a random input that a layer with merged weights computes what the adapted layer computes.

    Args:
        path: Path of the layer, for messages.
        layer: The layer, with its base weights.
        adapters: Its adapters.
        blend: The adapters that are merged.
        merged: The merged weights before they are rounded, by attribute.

    Raises:
        AdapterStateError: The outputs differ, or the layer cannot be compared.
    """
    acting = [adapters[name] for name, _ in blend if name in adapters]
    # The effective weights of attention are the merged ones. Experts are called with tokens and the experts of each.
    is_routed = len(inspect.signature(layer.forward).parameters) >= 3
    if all(m.leaves_output or (m.shadows and not (m.splits and is_routed)) for m in acting):
        return
    if quantised_weight(layer) is not None:
        return
    tensors = [*layer.parameters(), *layer.buffers()]
    if any(tensor.is_meta or isinstance(tensor, FakeTensor) for tensor in tensors):
        return
    device = next(iter(merged.values())).device if merged else tensors[0].device
    try:
        with seeded(0, [device]), torch.no_grad(), no_autocast(torch.empty(0, device=device)):
            call = _trial_call(path, layer)
            base, adapted, after = (
                _output(_wide(layer, weights, Activation(Choice((acts,)))), call)
                for weights, acts in (({}, ()), ({}, blend), (merged, ()))
            )
    except Exception as error:
        raise AdapterStateError(
            f"{_names(blend)} cannot be merged: '{path}' ({type(layer).__name__}) raises {type(error).__name__} on a "
            f"trial input ({error}), so the merged layer cannot be compared with the adapted one. Use it unmerged, "
            "with activate()."
        ) from error
    contribution, difference = (adapted - base).abs().max(), (after - adapted).abs().max()
    rounding = ROUNDING.get(device.type, 1e-3) * adapted.abs().max()
    if not difference <= SHARE * contribution + rounding:
        raise AdapterStateError(
            f"{_names(blend)} cannot be merged: at '{path}' the merged {type(layer).__name__} differs from the adapted "
            f"one by {float(difference / contribution):.2g} of what the adapter adds. Its forward method, a forward "
            "hook, or a bias of B on a layer without a bias computes something else than the weight and the adapter's "
            "product. Use it unmerged, with activate()."
        )


def _names(blend: Blend) -> str:
    return ", ".join(f"'{name}'" for name, _ in blend)


def _trial_call(path: str, layer: nn.Module) -> tuple[tuple, dict[str, Any]]:
    """Return random arguments for a call of a layer: vectors, ids, or for experts vectors with routes."""
    if kind_of_formula(layer) is not None:
        x = trial_input(layer).to(wide_dtype(layer.weight))  # type: ignore[arg-type]
        x = x.long() if isinstance(layer, nn.Embedding) else x
        position, name = input_parameter(type(layer))
        return ((x,), {}) if position == 0 else ((), {name: x})
    if names := stacked_weights(path, layer):
        weight = StackedWeight(layer, names[0])
        experts, _, width = weight_shape(weight)
        options: Any = {"device": weight.weight.device, "dtype": wide_dtype(weight.weight)}
        index = torch.randint(experts, (TOKENS, 1), device=weight.weight.device)
        return (torch.randn(TOKENS, width, **options), index, torch.ones(TOKENS, 1, **options)), {}
    raise TypeError(f"it is a {type(layer).__name__}, whose input is not known")


def _output(layer: nn.Module, call: tuple[tuple, dict[str, Any]]) -> Tensor:
    args, kwargs = call
    output = layer(*args, **kwargs)
    output = output[0] if isinstance(output, tuple) else output
    return torch.nan_to_num(output.float() if output.dtype.itemsize < 4 else output)


def _wide(module: nn.Module, weights: Mapping[str, Tensor], activation: Activation) -> nn.Module:
    """Return a copy of a layer in evaluation mode and float32 or wider, with some weights and a choice of its own.

    It keeps the layer's hooks and adapters.
    """
    copy = object.__new__(type(module))
    copy.__dict__.update(module.__dict__, training=False, _compiled_call_impl=None)
    if "_hf_hook" in copy.__dict__:  # of accelerate, whose `forward` calls the layer itself
        copy.__dict__.pop("forward", None)
    if isinstance(module, LayerAdapters):
        copy.__dict__["activation"] = activation
    for kind in ("_parameters", "_buffers"):
        tensors = {name: _wide_tensor(tensor) for name, tensor in getattr(module, kind).items()}
        copy.__dict__[kind] = tensors | {n: t for n, t in weights.items() if n in tensors}
    copy.__dict__["_modules"] = {
        name: None if child is None else _wide(child, {}, activation)
        for name, child in module._modules.items()
    }
    return copy


def _wide_tensor(tensor: Tensor | None) -> Tensor | None:
    if tensor is None or not tensor.is_floating_point():
        return tensor
    return tensor.detach().to(wide_dtype(tensor))
