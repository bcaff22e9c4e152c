"""The LoRA class of each layer type, and the module of a tied output head."""

from __future__ import annotations

from torch import nn

from lorakit.errors import ConfigurationError, TargetError
from lorakit.methods.lora.convolution import ConvLoRA
from lorakit.methods.lora.embedding import EmbeddingLoRA, TiedHeadLoRA
from lorakit.methods.lora.experts import StackedLoRA
from lorakit.methods.lora.layer import LoRALayer
from lorakit.methods.lora.linear import AttentionLoRA, LinearLoRA, OutProjectionLoRA
from lorakit.methods.module import AdapterModule
from lorakit.models.direct_reads import never_calls
from lorakit.models.heads import input_embeddings, output_embeddings
from lorakit.models.layers import StackedWeight, is_linear, why_not_adaptable
from lorakit.models.tree import base_modules, submodule


def kind_of(layer: nn.Module, model: nn.Module, path: str) -> type[LoRALayer]:
    """Return the LoRA class of a layer.

    Raises:
        TargetError: LoRA does not support the layer.
    """
    if reason := why_not_adaptable(layer):
        raise TargetError(
            f"'{path}' is a {type(layer).__name__}, which LoRA cannot adapt: {reason}. lorakit.targets(model) lists "
            "the layers that it adapts."
        )
    if isinstance(layer, nn.MultiheadAttention):
        return AttentionLoRA
    if is_linear(layer):
        owner = submodule(model, path.rpartition(".")[0])
        return OutProjectionLoRA if isinstance(owner, nn.MultiheadAttention) else LinearLoRA
    if isinstance(layer, nn.Embedding):
        return EmbeddingLoRA
    if isinstance(layer, StackedWeight):
        return StackedLoRA
    return ConvLoRA


def tied_head(model: nn.Module, modules: dict[str, AdapterModule]) -> tuple[str, TiedHeadLoRA]:
    """Return the path of the output head, and a module that applies the embedding's adapter to it.

    Raises:
        ConfigurationError: The embedding is not adapted, or the head is not tied to it.
    """
    path_of = {id(module): path for path, module in base_modules(model)}
    table, head = input_embeddings(model), output_embeddings(model)
    source = modules.get(path_of.get(id(table), "")) if table is not None else None
    if not isinstance(source, EmbeddingLoRA):
        raise ConfigurationError(
            "tie_head applies the embedding's adapter to the output head, and no target adapts one input embedding "
            "(an encoder and its decoder have two). Add 'embedding' to targets, or remove tie_head."
        )
    if head is None or table is None or head.weight is not table.weight:
        raise ConfigurationError(
            "tie_head is set, and this model's output head does not share the embedding's weights. "
            "Remove tie_head; to adapt the head as well, add 'head' to targets."
        )
    parent, _, name = path_of[id(head)].rpartition(".")
    if never_calls(submodule(model, parent), name):
        raise ConfigurationError(
            f"tie_head is set, and this model uses the weight of '{path_of[id(head)]}' without calling it, so an "
            "adapter would have no effect there. Remove tie_head."
        )
    if path_of[id(head)] in modules:
        raise ConfigurationError(
            "tie_head and a target for the head both adapt the output head. Choose one of the two."
        )
    return path_of[id(head)], TiedHeadLoRA(head, source)
