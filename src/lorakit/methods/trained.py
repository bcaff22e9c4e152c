"""Base parameters that a method trains in full."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lorakit.errors import TargetError, nearest
from lorakit.models.heads import called_instead
from lorakit.models.layers import is_packed_linear
from lorakit.models.packed import packed_layers
from lorakit.models.parameter_swaps import named_base_parameters
from lorakit.models.quantised import quantised_weights
from lorakit.models.tree import base_modules, is_inside, walk


def modules_named(model: nn.Module, entries: Sequence[str]) -> list[str]:
    """Return the paths of the modules that ``train_modules`` names by path or path suffix.

    Raises:
        TargetError: An entry names no module.
    """
    paths = [path for path, _ in base_modules(model)]
    matches: dict[str, None] = {}
    for entry in entries:
        hits = [path for path in paths if path == entry or path.endswith(f".{entry}")]
        if not hits:
            raise TargetError(
                f"train_modules names '{entry}', and no module of the model has that name."
                + nearest(entry, {path.rsplit(".", 1)[-1] for path in paths})
            )
        matches.update(dict.fromkeys(hits))
    return list(matches)


def require_called(model: nn.Module, names: set[str]) -> None:
    """Reject the training of an embedding that the model never calls without those that it calls instead.

    T5 and BART share one weight between `shared`, which only holds it, and the embeddings of encoder and decoder.

    Args:
        model: The base.
        names: The names of the trained parameters.

    Raises:
        TargetError: The training would have no effect.
    """
    for at in walk(model):
        if f"{at.path}.weight" not in names:
            continue
        start = at.path[: at.path.rfind(".") + 1]
        instead = [start + path for path in called_instead(at)]
        if not {f"{path}.weight" for path in instead} <= names:
            raise TargetError(
                f"'{at.path}' is to be trained in full, and {type(at.parent).__name__} never calls it, so that would "
                f"have no effect. Name the embeddings that it calls in its place: {', '.join(instead)}."
            )


def parameter_names(model: nn.Module) -> list[str]:
    """Return the names of the base's parameters, with every name of a tied parameter.

    Weight and bias of a packed layer are among them, also as buffers: whoever wants to train them gets an error.
    """
    packed = [
        f"{path}.{attribute}"
        for path, layer in base_modules(model)
        if is_packed_linear(layer)
        for attribute in ("weight", "bias")
        if attribute not in layer._parameters
        and (attribute == "weight" or getattr(layer, attribute, None) is not None)
    ]
    return [*(name for name, *_ in named_base_parameters(model, remove_duplicate=False)), *packed]


REQUIRED_GRADIENT = "_lorakit_required_gradient"
"""Attribute of a model with adapters, which freeze it: `requires_grad` of each parameter before the first one, by every
name of the parameter."""


def gradient_flags(model: nn.Module) -> dict[str, bool]:
    """Return `requires_grad` of the base's parameters, as before the first adapter, by every name."""
    named = named_base_parameters(model, remove_duplicate=False)
    flags = {name: parameter.requires_grad for name, _, parameter in named}
    return flags | getattr(model, REQUIRED_GRADIENT, {})


def frozen_parameters(model: nn.Module) -> set[str]:
    """Return the names of the parameters that were frozen before the first adapter, without quantised weights."""
    quantised = {f"{path}.weight" for path, _ in quantised_weights(model)}
    quantised |= {f"{path}.weight" for path, *_ in packed_layers(model)}
    flags = gradient_flags(model)
    return {name for name, flag in flags.items() if not flag and name not in quantised}


def parameters_below(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """Return the names of the base's parameters in the modules at `paths`."""
    return [n for n in parameter_names(model) if is_inside(n, *paths)]
