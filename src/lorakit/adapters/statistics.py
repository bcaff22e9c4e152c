"""Running statistics of batch and instance normalisation, which a forward pass in training mode changes.

Each layer records its statistics from before the first adapter, or from base weights that were loaded since.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lorakit.errors import AdapterStateError
from lorakit.models.tree import base_modules, key_start

_RECORDED = "_lorakit_statistics"
"""Attribute of a layer: copies of its statistics, by name."""


def layers_with_statistics(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield path and module of each layer that has running statistics."""
    for path, module in base_modules(model):
        if isinstance(module, _NormBase) and module.running_mean is not None:
            yield path, module


def record_statistics(model: nn.Module) -> None:
    """Record the statistics of all layers."""
    for _, layer in layers_with_statistics(model):
        buffers = layer.named_buffers(recurse=False)
        layer.__dict__[_RECORDED] = {name: buffer.clone() for name, buffer in buffers}


def record_loaded(module: nn.Module, state_dict: Mapping[str, Tensor], prefix: str) -> None:
    """Record the statistics in a state dict of base weights, which is about to be loaded into `module`."""
    for path, layer in layers_with_statistics(module):
        start = prefix + key_start(module, path)
        for name, recorded in layer.__dict__.get(_RECORDED, {}).items():
            loaded = state_dict.get(start + name)
            if loaded is not None and loaded.shape == recorded.shape:
                layer.__dict__[_RECORDED][name] = loaded.detach().clone()


def records_statistics(module: nn.Module) -> bool:
    """Return whether a layer has recorded its statistics."""
    return _RECORDED in module.__dict__


def forget_statistics(model: nn.Module) -> None:
    """Undo `record_statistics`."""
    for _, layer in layers_with_statistics(model):
        layer.__dict__.pop(_RECORDED, None)


def require_unchanged_statistics(model: nn.Module) -> None:
    """Raise an AdapterStateError if the statistics of a layer differ from the recorded ones."""
    for path, layer in layers_with_statistics(model):
        if _changed(layer):
            raise AdapterStateError(
                f"The running statistics of '{path}' have changed since the first adapter was attached. An adapter's "
                "file holds none, so it would compute something else on the base. Train with this layer in eval mode: "
                "call its eval() after each model.train(). To keep the changed statistics, merge(keep_base=False) and "
                "save the whole model."
            )


@torch.no_grad()
def restore_statistics(model: nn.Module) -> None:
    """Put the recorded statistics back where they have changed."""
    for _, layer in layers_with_statistics(model):
        for name, recorded in _changed(layer).items():
            layer._buffers[name].copy_(recorded)  # type: ignore[union-attr]


def _changed(layer: nn.Module) -> dict[str, Tensor]:
    """Return the recorded statistics of a layer if any of them has changed, else nothing."""
    recorded: dict[str, Tensor] = layer.__dict__.get(_RECORDED, {})
    now = dict(layer.named_buffers(recurse=False))
    same = all(_is_same(now[name], tensor) for name, tensor in recorded.items())
    return {} if same else recorded


def _is_same(buffer: Tensor, recorded: Tensor) -> bool:
    """Return whether statistics are the recorded ones, which a cast to half precision and back may have rounded."""
    if buffer.is_meta or recorded.is_meta:
        return True
    halves = (torch.bfloat16, torch.float16) if buffer.is_floating_point() else ()
    recorded = recorded.to(buffer.device)
    return any(buffer.equal(recorded.to(d).to(buffer.dtype)) for d in (buffer.dtype, *halves))
