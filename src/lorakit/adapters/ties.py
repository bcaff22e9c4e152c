"""`resize_token_embeddings` and `tie_weights` of a model that carries adapters.

Both put other modules or parameters into the model. An adapter on an embedding or on the head would be lost with its
layer, and the tensor that an adapter trains or has merged would be tied away, or become the base's.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lorakit.adapters.export import tied_names
from lorakit.adapters.installed import adapted_layers
from lorakit.adapters.replaced_methods import OwnMethod, call_replaced
from lorakit.errors import AdapterStateError
from lorakit.models.heads import input_embeddings, output_embeddings
from lorakit.models.parameter_swaps import base_parameter


def resize_token_embeddings(
    model: nn.Module, own: OwnMethod, new_num_tokens: int | None = None, *args: Any, **kwargs: Any
) -> Any:
    """Resize by the model's own method, unless an adapter is on an embedding or on the head.

    Raises:
        AdapterStateError: An adapter is there, and the size would change.
    """
    embeddings = input_embeddings(model)
    size = getattr(embeddings, "num_embeddings", None)
    is_same = new_num_tokens in (None, size) and not (args or kwargs.get("pad_to_multiple_of"))
    resized = [
        base_parameter(layer, "weight")
        for layer in (embeddings, output_embeddings(model))
        if layer is not None and "weight" in layer._parameters
    ]
    for path, layer, adapters in () if is_same else adapted_layers(model):
        if "weight" in layer._parameters:
            weight = base_parameter(layer, "weight")
            if any(weight is one for one in resized):
                raise AdapterStateError(
                    f"resize_token_embeddings() would replace '{path}', which the adapter '{next(iter(adapters))}' "
                    "changes. Resize the base before you attach or load the adapter."
                )
    return call_replaced(model, "resize_token_embeddings", own, new_num_tokens, *args, **kwargs)


def tie_weights(model: nn.Module, own: OwnMethod, *args: Any, **kwargs: Any) -> Any:
    """Tie by the model's own method; do nothing while a trained or merged tensor replaces a tied one of the base.

    The base was tied before its first adapter, so nothing is missing then.
    """
    replaced = {
        f"{path}.{attribute}"
        for path, _, adapters in adapted_layers(model)
        for attribute in adapters.replaced
    }
    if any(replaced.intersection(names) for names in tied_names(model)):
        return None
    return call_replaced(model, "tie_weights", own, *args, **kwargs)
