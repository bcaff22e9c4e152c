"""Replace base weights by merged tensors, and restore them."""

from __future__ import annotations

import logging

import torch
from torch import nn

from lorakit.adapters.activation import Active
from lorakit.adapters.export import unties
from lorakit.adapters.installed import adapted_layers, unmergeable
from lorakit.adapters.layer_adapters import after_forward, remove_adapter_hook
from lorakit.errors import AdapterStateError
from lorakit.models.quantised import become_whole, make_whole, quantised_weight

_LOG = logging.getLogger(__name__)


@torch.no_grad()
def merge(model: nn.Module, active: Active) -> None:
    """Replace the weight of every layer that an active adapter changes by ``W + sum of weight * delta``.

    All merged tensors are computed before the first is swapped in, so an error changes nothing. For a weight
    that bitsandbytes quantised, the result is ``W_q`` plus the delta in the layer's compute dtype. Quantising
    it again would lose most of the delta.

    Raises:
        AdapterStateError: A weight has an unsupported quantisation or is not a parameter, or an adapter cannot
            be merged.
    """
    require_mergeable(model, active)
    names = [name for name, _ in active.weights]
    merged = []
    for path, layer, adapters in adapted_layers(model):
        for attribute in adapters.weights_changed_by(path, layer, names):
            W = getattr(layer, attribute)
            if not W.is_floating_point() and quantised_weight(layer, W) is None:
                raise AdapterStateError(
                    f"The weight of '{path}' has a quantisation ({W.dtype}) that lorakit does not support, so no delta "
                    "can be added to it. Merge into a base loaded in bfloat16 or float32."
                )
            weight = adapters.effective_weight(layer, attribute, active.weights)
            merged.append((layer, adapters, attribute, weight))
    for layer, adapters, attribute, weight in merged:
        adapters.replace(layer, attribute, nn.Parameter(weight, requires_grad=False))
    for _, layer, adapters in adapted_layers(model):
        adapters.merged = True
        # In training the hook stays: it rejects the recomputation of a checkpointed block. Among other hooks it stays
        # too, because they must run before or after the adapter again once it is unmerged.
        is_alone = len(layer._forward_hooks) == 1
        if is_alone and not model.training and not adapters.activation.recomputation_pending:
            remove_adapter_hook(layer)


def require_mergeable(model: nn.Module, active: Active) -> None:
    """Raise an AdapterStateError if an active adapter cannot be merged: merging would change the model's function."""
    for name, reason in unmergeable(model, [name for name, _ in active.weights]):
        raise AdapterStateError(
            f"'{name}' cannot be merged: {reason}. Use it unmerged, with activate()."
        )


def unmerge(model: nn.Module) -> None:
    """Restore every base parameter."""
    for _, layer, adapters in adapted_layers(model):
        adapters.restore(layer)
        adapters.merged = False
        # A hook that was removed was alone, so those registered since run after it.
        if after_forward not in layer._forward_hooks.values():
            layer.register_forward_hook(after_forward, with_kwargs=True, prepend=True)


def forget_base(model: nn.Module) -> None:
    """Make the merged tensors permanent, and clear `tie_word_embeddings` if the merge untied the head.

    Every layer of a quantised base becomes an ordinary layer.
    """
    if unties(model, model.state_dict()):
        model.config.tie_word_embeddings = False  # type: ignore[union-attr]
    merged = 0  # quantised weights only
    for _, layer, adapters in adapted_layers(model):
        for attribute in list(adapters.replaced):
            merged_weight = layer._parameters[attribute]
            quantised = quantised_weight(layer, adapters.forget(attribute))
            if quantised is not None:
                assert merged_weight is not None
                become_whole(quantised, merged_weight.data)
                merged += 1
    others = make_whole(model)
    if merged or others:
        _LOG.warning(
            "The base was quantised: the merged model holds the dequantised weights (%d merged, %d others), not the "
            "original ones. To keep the original weights, merge into the base loaded unquantised.",
            merged,
            others,
        )
