"""The running statistics of batch normalisation: a forward pass in training mode changes them, without a gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lorakit.models.layers import base_modules


def copy_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the statistics of all layers, by their keys in the state dict."""
    return {key: buffer.clone() for key, buffer in statistics_of(model)}


def first_changed(model: nn.Module, before: Mapping[str, Tensor]) -> str | None:
    """Return the first layer that has computed in training mode since `copy_statistics`; None without one."""
    for key, buffer in statistics_of(model):
        path, _, name = key.rpartition(".")
        known = before.get(key)
        # The other statistics also change if the model is cast to another dtype and back.
        is_count = name == "num_batches_tracked" and not buffer.is_meta
        if is_count and known is not None and not known.is_meta and int(buffer) != int(known):
            return path
    return None


@torch.no_grad()
def restore_statistics(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Put the statistics back, if they have changed since `copy_statistics`."""
    if first_changed(model, before) is None:
        return
    for key, buffer in statistics_of(model):
        if key in before:
            buffer.copy_(before[key])


def statistics_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the statistics of all layers, with their keys in the state dict."""
    for path, module in base_modules(model):
        if isinstance(module, _BatchNorm):
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    yield f"{path}.{name}", buffer
