"""Tied weights, and `resize_token_embeddings` and `tie_weights` of a model that carries adapters.

Both methods put other modules or parameters into the model. An adapter on an embedding or on the head would be lost
with its layer, and the tensor that an adapter trains or has merged would be tied away, or become the base's.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lorakit.adapters.installed import adapted_layers
from lorakit.adapters.replaced_methods import OwnMethod
from lorakit.errors import AdapterStateError
from lorakit.models.heads import input_embeddings, output_embeddings
from lorakit.models.parameter_swaps import base_parameter, grouped_base_parameters


def tied_names(model: nn.Module) -> list[list[str]]:
    """Return the names of each parameter that several layers of the base share."""
    return [names for names, *_ in grouped_base_parameters(model) if len(names) > 1]


def unties(model: nn.Module, state: dict[str, Tensor]) -> bool:
    """Return whether `state` has different tensors for all names that the base ties.

    Only then may `tie_word_embeddings` be cleared: transformers does not save names that are still tied, and without
    the setting it would initialise them randomly. With the setting, it ties no names whose tensors differ.
    """
    groups = [[state[n].data_ptr() for n in names if n in state] for names in tied_names(model)]
    return bool(groups) and all(len({*group}) == len(group) for group in groups)


def separate_names(groups: list[list[str]], tensors: dict[str, Tensor]) -> None:
    """Give each name of a tied parameter a tensor of its own in `tensors`, unless all names still have the same.

    transformers saves tensors that share memory once, under the name in its table of tied weights. While all names of
    this table agree, that is enough. T5 ties four names, and without this a file would lack the two embeddings that
    are still one.
    """
    for names in groups:
        present = [name for name in names if name in tensors]
        if len({tensors[name].data_ptr() for name in present}) > 1:
            seen = set()
            for name in present:
                if (address := tensors[name].data_ptr()) in seen:
                    tensors[name] = tensors[name].clone()
                seen.add(address)


def resize_token_embeddings(
    model: nn.Module, own: OwnMethod, new_num_tokens: int | None = None, *args: Any, **kwargs: Any
) -> Any:
    """Resize by the model's own method, unless an adapter is on an embedding or on the head.

    Raises:
        AdapterStateError: An adapter is there, and another size is given, or one to round up to.
    """
    embeddings = input_embeddings(model)
    resized = [
        base_parameter(layer, "weight")
        for layer in (embeddings, output_embeddings(model))
        if layer is not None and "weight" in layer._parameters
    ]
    for path, layer, adapters in adapted_layers(model):
        weight = base_parameter(layer, "weight") if "weight" in layer._parameters else None
        if not any(weight is one for one in resized):
            continue
        if new_num_tokens in (None, getattr(embeddings, "num_embeddings", None)) and not any(
            (*args[:1], kwargs.get("pad_to_multiple_of"))
        ):
            return embeddings  # T5's own method would put `shared` in place of the embeddings that it calls
        raise AdapterStateError(
            f"resize_token_embeddings() would replace '{path}', which the adapter '{next(iter(adapters))}' changes. "
            "Resize the base before you attach or load the adapter."
        )
    return own(new_num_tokens, *args, **kwargs)


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
    return own(*args, **kwargs)
