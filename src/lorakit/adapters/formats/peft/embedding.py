"""Adapters on the scaled embedding of Gemma 3 and 3n, by version of PEFT.

This embedding multiplies the vectors that it looks up by `embed_scale`, sqrt(hidden_size) for the tokens. PEFT scales
the adapter's part too since 0.18 (https://github.com/huggingface/peft/pull/2825, for DoRA pull/2839). Earlier versions
add it unscaled. They scaled that of Gemma 1 and 2, which multiplied outside of the layer at that time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from lorakit.adapters.formats.stored_layer import StoredLayer
from lorakit.errors import AdapterFileError
from lorakit.methods.lora.forms import EmbeddingForm


def depends_on_version(layers: Mapping[str, StoredLayer], model_type: str | None) -> bool:
    """Return whether the effect of an adapter depends on the version of PEFT for this reason."""
    is_scaled = (model_type or "").startswith("gemma3")
    return is_scaled and any(layer.kind == EmbeddingForm.kind for layer in layers.values())


def as_trained(
    layers: dict[str, StoredLayer], model: nn.Module, modules: Mapping[str, Any]
) -> list[str]:
    """Divide the scaling of embeddings by `embed_scale`, in place, for a file of PEFT before 0.18.

    Args:
        layers: The layers of the file by path.
        model: The base.
        modules: Its modules by path.

    Returns:
        A notice for each layer that was changed.

    Raises:
        AdapterFileError: It has DoRA, whose weight norms were computed with the whole scaling.
    """
    if not depends_on_version(layers, getattr(getattr(model, "config", None), "model_type", None)):
        return []
    notices = []
    for path, layer in layers.items():
        scale = float(getattr(modules.get(path), "embed_scale", 1.0))
        if layer.kind != EmbeddingForm.kind or scale == 1:
            continue
        if layer.magnitude is not None:
            raise AdapterFileError(
                f"it has DoRA on '{path}' and was written by PEFT before 0.18, which did not scale the adapter's part "
                "there: lorakit would compute something else than the adapter was trained with. Merge it with that "
                "PEFT, and use the merged model."
            )
        layers[path] = replace(layer, scaling=layer.scaling / scale, alpha=layer.alpha / scale)
        notices.append(
            "The file does not record its version of PEFT, so that is below 0.18. Such versions do not multiply an "
            f"adapter on '{path}' by the scale of this embedding. lorakit computes the same: it divided alpha by "
            f"{scale:g}."
        )
    return notices
