"""Running statistics of batch and instance normalisation, which a forward pass in training mode changes.

The model records them from before the first adapter, or from base weights that were loaded since.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lorakit.adapters.tensor_checks import equals_base
from lorakit.errors import AdapterStateError
from lorakit.models.tree import base_modules

RECORDED = "_lorakit_statistics"
"""Attribute of a model with adapters: copies of the statistics, by name."""


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Return the running statistics of the base by name."""
    return {
        f"{path}.{name}".removeprefix("."): buffer
        for path, layer in base_modules(model)
        if isinstance(layer, _NormBase)
        for name, buffer in layer.named_buffers(recurse=False)
    }


def record_statistics(model: nn.Module) -> None:
    """Record the running statistics of a model."""
    recorded = {name: buffer.clone() for name, buffer in running_statistics(model).items()}
    setattr(model, RECORDED, recorded)


def record_loaded(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Record the statistics in a state dict of base weights, which is about to be loaded into `model`."""
    recorded: dict[str, Tensor] = getattr(model, RECORDED, {})
    recorded |= {name: state[name].detach().clone() for name in recorded if name in state}


def require_unchanged_statistics(model: nn.Module) -> None:
    """Raise an AdapterStateError if running statistics differ from the recorded ones."""
    if name := next(iter(_changed(model)), None):
        raise AdapterStateError(
            f"The running statistics of '{name.rpartition('.')[0]}' have changed since the first adapter was attached. "
            "An adapter's file holds none, so it would compute something else on the base. Train with this layer in "
            "eval mode: call its eval() after each model.train(). To keep the changed statistics, "
            "merge(keep_base=False) and save the whole model."
        )


@torch.no_grad()
def restore_statistics(model: nn.Module) -> None:
    """Put the recorded statistics back where they have changed."""
    buffers = running_statistics(model)
    for name, recorded in _changed(model).items():
        buffers[name].copy_(recorded)


def _changed(model: nn.Module) -> dict[str, Tensor]:
    """Return the recorded statistics that have changed."""
    recorded: dict[str, Tensor] = getattr(model, RECORDED, {})
    return {
        name: recorded[name]
        for name, buffer in running_statistics(model).items()
        if name in recorded and not buffer.is_meta and not equals_base(recorded[name], buffer)
    }
