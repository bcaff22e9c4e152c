"""Merged weights as tensors of their own, which take the base's place and give it back."""

from __future__ import annotations

import torch
from torch import nn

from lorakit.adapters.activation import Active
from lorakit.adapters.export import unties
from lorakit.adapters.installed import adapted_layers
from lorakit.errors import AdapterStateError


@torch.no_grad()
def merge(model: nn.Module, active: Active) -> None:
    """Swap in ``W + sum of weight * delta`` on every layer that an active adapter changes.

    All merged tensors are computed before the first is swapped in: an error changes nothing.

    Raises:
        AdapterStateError: A weight is quantised, or an adapter has no merged form.
    """
    names = [name for name, _ in active.weights]
    merged = []
    for path, layer, adapters in adapted_layers(model):
        for attribute in adapters.weights_changed_by(layer, names):
            W = getattr(layer, attribute)
            if not W.is_floating_point():
                raise AdapterStateError(
                    f"The weight of '{path}' is quantised ({W.dtype}), and rounding a merged weight back would "
                    "change the base. Merge into a base loaded in bfloat16 or float32."
                )
            weight = adapters.effective_weight(layer, attribute, list(active.weights))
            merged.append((layer, adapters, attribute, weight))
    for layer, adapters, attribute, weight in merged:
        adapters.replace(layer, attribute, nn.Parameter(weight, requires_grad=False))
    for _, _, adapters in adapted_layers(model):
        adapters.merged = True


def unmerge(model: nn.Module) -> None:
    """Put every base parameter back."""
    for _, layer, adapters in adapted_layers(model):
        for attribute in list(adapters.replaced):
            adapters.restore(layer, attribute)
        adapters.merged = False


def forget_base(model: nn.Module) -> None:
    """Make what has the base's place permanent, and record in the configuration what it untied."""
    if unties(model, model.state_dict()):
        model.config.tie_word_embeddings = False  # type: ignore[union-attr]
    for _, _, adapters in adapted_layers(model):
        for attribute in list(adapters.replaced):
            adapters.forget(attribute)
