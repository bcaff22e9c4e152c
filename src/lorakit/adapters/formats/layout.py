"""The facts about a live base model that the file formats need."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from lorakit.models.parameter_swaps import grouped_base_parameters
from lorakit.models.tree import base_modules, is_of_adapter, without_wrappers


@dataclass(frozen=True)
class BaseLayout:
    """Names and shapes of a base model without its adapters; never written to a file."""

    modules: tuple[str, ...]
    """Paths of all modules, each once, in the order of `named_modules`."""
    shapes: dict[str, tuple[int, ...]]
    """Shape of each entry of the state dict, by key."""
    names: ParameterNames
    beyond_peft: dict[str, str]
    """See the function `beyond_peft`."""
    num_labels: int | None
    """The number of labels in the model's configuration, which matters for classification only."""

    def below(self, path: str) -> list[str]:
        """Return the state-dict keys of the module at `path`."""
        return [key for key in self.shapes if key.startswith(f"{path}.")]

    def is_attention(self, path: str) -> bool:
        """Whether an `nn.MultiheadAttention` is at `path`."""
        return f"{path}.in_proj_weight" in self.shapes or f"{path}.q_proj_weight" in self.shapes


class ParameterNames(NamedTuple):
    """The parameters of a base model, without its adapters."""

    parameters: dict[str, Tensor]
    """The parameters by each of their names (not copied)."""
    aliases: dict[str, tuple[str, ...]]
    """The other names of each tied parameter, by its first name."""

    def names_of(self, name: str) -> tuple[str, ...]:
        """Return all names of the parameter with this name, in the order of the model."""
        for first, others in self.aliases.items():
            if name == first or name in others:
                return (first, *others)
        return (name,)


def parameters_by_name(model: nn.Module) -> ParameterNames:
    """Return the parameters of a live model by each of their names, without those of its adapters."""
    groups = grouped_base_parameters(model, remove_duplicate=False)
    parameters = {name: tensor.detach() for names, _, tensor in groups for name in names}
    aliases = {first: tuple(others) for (first, *others), *_ in groups if others}
    return ParameterNames(parameters, aliases)


def base_layout(model: nn.Module) -> BaseLayout:
    """Return the layout of a live model, without its adapters."""
    return BaseLayout(
        modules=tuple(path for path, _ in base_modules(model) if path),
        shapes={
            without_wrappers(key): tuple(value.shape)
            for key, value in model.state_dict().items()
            if isinstance(value, Tensor) and not is_of_adapter(key)
        },
        names=parameters_by_name(model),
        beyond_peft=beyond_peft(model),
        num_labels=getattr(getattr(model, "config", None), "num_labels", None),
    )


def beyond_peft(model: nn.Module) -> dict[str, str]:
    """Return the layers on which PEFT computes something else than lorakit: path -> reason."""
    places = Counter(
        id(child) for _, module in base_modules(model) for child in module._modules.values()
    )
    reasons: dict[str, str] = {}
    for path, module in base_modules(model, remove_duplicate=False):
        if places[id(module)] > 1:
            reasons[path] = (
                "the model uses it at several paths, and PEFT replaces it at one of them"
            )
        elif (reason := _why_peft_differs(module)) is not None:
            reasons[path] = reason
    return reasons


def _why_peft_differs(layer: nn.Module) -> str | None:
    """Return why PEFT does not compute ``W + scaling * B A`` on this layer, or None if it does."""
    if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return None
    if layer.padding_mode != "zeros":
        return f"PEFT's convolution always pads with zeros, but the padding_mode is {layer.padding_mode}"
    if any(step != 1 for step in layer.dilation):
        return f"PEFT's convolution has no dilation, but the layer's is {layer.dilation}"
    return None
