"""What a file format needs to know of a live base model beside the adapter's own tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit.adapters.formats.stored_layer import StoredLayer
from lorakit.adapters.installed import base_parameter
from lorakit.models.layers import is_of_adapter


@dataclass(frozen=True)
class BaseLayout:
    """Names and shapes of a base model, without its adapters. Never written to a file."""

    modules: tuple[str, ...]
    """Paths of all modules, each once, as `named_modules` gives them."""
    shapes: dict[str, tuple[int, ...]]
    """Shape of each entry of the state dict, by key."""
    aliases: dict[str, tuple[str, ...]]
    """The further names of each tied parameter, by its first name."""
    parameters: dict[str, Tensor]
    """The base's own parameters, by each of their names (no copies)."""
    beyond_peft: dict[str, str]
    """Why PEFT computes something else on a layer, by the layer's path."""
    transposed: frozenset[str]
    """Paths of the layers that store their weight as (in, out)."""
    output_head: str | None
    """Path of the output embeddings, where the model says which they are."""

    def describe(self, path: str, layer: StoredLayer) -> StoredLayer:
        """The stored layer with what the model knows about it filled in."""
        shape = self.shapes.get(f"{path}.weight", ())
        if layer.kind == "conv-loralib" and len(shape) > 2:
            return replace(layer, weight_shape=shape)
        if layer.kind == "conv" and len(shape) > 2:
            return replace(layer, grouped=layer.A.shape[1] == shape[1])
        if layer.kind == "linear":
            return replace(layer, transposed=path in self.transposed)
        return layer

    def with_tied_head(self, layers: dict[str, StoredLayer]) -> dict[str, StoredLayer]:
        """The layers, the embedding that shares its weight with the output head marked as tied."""
        head = self.output_head
        return {
            path: replace(layer, tied_head=head)
            if layer.kind == "embedding" and f"{head}.weight" in self.names_of(f"{path}.weight")
            else layer
            for path, layer in layers.items()
        }

    def names_of(self, name: str) -> tuple[str, ...]:
        """All names of the parameter that has this one."""
        for first, others in self.aliases.items():
            if name == first or name in others:
                return (first, *others)
        return (name,)

    def below(self, path: str) -> list[str]:
        """Keys of the state dict that belong to the module at `path`."""
        return [key for key in self.shapes if key.startswith(f"{path}.")]

    def is_attention(self, path: str) -> bool:
        """Whether an `nn.MultiheadAttention` is at `path`."""
        return f"{path}.in_proj_weight" in self.shapes or f"{path}.q_proj_weight" in self.shapes


def base_layout(model: nn.Module) -> BaseLayout:
    """Look at a live model; its adapters are left out."""
    paths: dict[int, list[str]] = {}
    modules: dict[str, nn.Module] = {}
    names: dict[int, list[str]] = {}
    parameters: dict[str, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if is_of_adapter(path):
            continue
        if id(module) not in paths:
            modules[path] = module
        paths.setdefault(id(module), []).append(path)
        for attribute, present in module._parameters.items():
            if present is not None:
                name = f"{path}.{attribute}" if path else attribute
                parameters[name] = base_parameter(module, attribute).detach()
                names.setdefault(id(base_parameter(module, attribute)), []).append(name)
    find_head = getattr(model, "get_output_embeddings", lambda: None)
    head = find_head()
    beyond = {path: reason for path, m in modules.items() if (reason := peft_differs_on(m))}
    for several in paths.values():
        if len(several) > 1:
            reason = "it stands at several places of the model, and PEFT replaces it at one"
            beyond.update(dict.fromkeys(several, reason))
    return BaseLayout(
        modules=tuple(path for path in modules if path),
        shapes={
            key: tuple(value.shape)
            for key, value in model.state_dict().items()
            if isinstance(value, Tensor) and not is_of_adapter(key)
        },
        aliases={first: tuple(others) for first, *others in names.values() if others},
        parameters=parameters,
        beyond_peft=beyond,
        transposed=frozenset(path for path, m in modules.items() if isinstance(m, Conv1D)),
        output_head=next((p for p, m in modules.items() if head is not None and m is head), None),
    )


def peft_differs_on(layer: nn.Module) -> str | None:
    """Why PEFT computes something else than ``W + scaling * B A`` on this layer, or None."""
    if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return None
    if layer.padding_mode != "zeros":
        return (
            f"PEFT's convolution pads with zeros, whatever the padding_mode ({layer.padding_mode})"
        )
    if any(step != 1 for step in layer.dilation):
        return f"PEFT's convolution has no dilation, and the layer's is {layer.dilation}"
    return None
