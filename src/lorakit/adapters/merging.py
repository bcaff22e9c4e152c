"""Merged weights as tensors of their own, which take the base's place and give it back."""

from __future__ import annotations

import logging

import torch
from torch import nn

from lorakit.adapters.activation import Active
from lorakit.adapters.export import unties
from lorakit.adapters.installed import adapted_layers
from lorakit.adapters.layer_adapters import listen, stop_listening
from lorakit.errors import AdapterStateError
from lorakit.models.quantised import become_whole, make_whole, quantised_weight

_LOG = logging.getLogger(__name__)


@torch.no_grad()
def merge(model: nn.Module, active: Active) -> None:
    """Swap in ``W + sum of weight * delta`` on every layer that an active adapter changes.

    All merged tensors are computed before the first is swapped in: an error changes nothing. A weight
    that bitsandbytes quantised gives way to ``W_q`` plus the delta in the dtype that the layer computes
    in: rounded to its few bits anew, most of the delta would be lost.

    Raises:
        AdapterStateError: A weight is quantised in a way that is not known here, or is no parameter, or an
            adapter has no merged form.
    """
    require_mergeable(model, active)
    names = [name for name, _ in active.weights]
    merged = []
    for path, layer, adapters in adapted_layers(model):
        for attribute in adapters.weights_changed_by(path, layer, names):
            W = getattr(layer, attribute)
            if not W.is_floating_point() and quantised_weight(layer, W) is None:
                raise AdapterStateError(
                    f"The weight of '{path}' is quantised ({W.dtype}) in a way that lorakit does not know, so that "
                    "nothing can be added to it. Merge into a base loaded in bfloat16 or float32."
                )
            weight = adapters.effective_weight(layer, attribute, list(active.weights))
            merged.append((layer, adapters, attribute, weight))
    for layer, adapters, attribute, weight in merged:
        adapters.replace(layer, attribute, nn.Parameter(weight, requires_grad=False))
    for _, layer, adapters in adapted_layers(model):
        adapters.merged = True
        # In training the hook stays, to refuse what a checkpointed block may still ask for.
        if not model.training and not adapters.activation.recomputation_pending:
            stop_listening(layer)


def require_mergeable(model: nn.Module, active: Active) -> None:
    """Raise an AdapterStateError where an adapter has no merged form."""
    for path, _, adapters in adapted_layers(model):
        for name, _ in active.weights:
            if name in adapters and not adapters[name].merges:
                raise AdapterStateError(
                    f"'{name}' cannot be merged: what it does at '{path}' is no change of a weight. Leave it beside "
                    "the base, as activate does."
                )


def unmerge(model: nn.Module) -> None:
    """Put every base parameter back."""
    for _, layer, adapters in adapted_layers(model):
        for attribute in list(adapters.replaced):
            adapters.restore(layer, attribute)
        adapters.merged = False
        listen(layer)


def forget_base(model: nn.Module) -> None:
    """Make what has the base's place permanent, and record in the configuration what it untied.

    Of a quantised base every layer becomes an ordinary one.
    """
    if unties(model, model.state_dict()):
        model.config.tie_word_embeddings = False  # type: ignore[union-attr]
    merged = 0
    for _, layer, adapters in adapted_layers(model):
        for attribute in list(adapters.replaced):
            whole = layer._parameters[attribute]
            quantised = quantised_weight(layer, adapters.forget(attribute))
            if quantised is not None:
                assert whole is not None
                become_whole(quantised, whole.data)
                merged += 1
    others = make_whole(model)
    if merged or others:
        _LOG.warning(
            "The base was quantised: the merged model holds its quantised weights, expanded (%d merged, %d others), "
            "not those that they were made from. To keep these, merge into the base loaded unquantised.",
            merged,
            others,
        )
