"""From settings and a model to the modules that sit on its layers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakit.errors import ConfigurationError, TargetError, nearest
from lorakit.methods.lora.attention import AttentionLoRA, OutProjectionLoRA
from lorakit.methods.lora.convolution import ConvLoRA
from lorakit.methods.lora.embedding import EmbeddingLoRA, TiedHeadLoRA
from lorakit.methods.lora.layer import LoRALayer, check_rank
from lorakit.methods.lora.linear import LinearLoRA
from lorakit.methods.module import AdapterModule
from lorakit.methods.trained import modules_named, parameters_below
from lorakit.models.layers import is_inside, is_of_adapter
from lorakit.models.roles import Place, resolve_targets

if TYPE_CHECKING:
    from lorakit.methods.lora.config import LoRA


def lora_modules(method: LoRA, model: nn.Module, dtype: torch.dtype) -> dict[str, AdapterModule]:
    """One initialised `LoRALayer` for each layer that the targets name, by path, in the model's order.

    Raises:
        TargetError: A target names no layer or one that cannot be adapted.
        ConfigurationError: A rank, option or pattern does not fit a layer.
    """
    by_path: dict[str, list[Place]] = {}
    for place in resolve_targets(model, method.targets):
        by_path.setdefault(place.path, []).append(place)
    _check_patterns(method, list(by_path))
    modules: dict[str, AdapterModule] = {}
    for path, here in by_path.items():
        layer = model.get_submodule(path)
        kind = kind_of(layer, model, path)
        rank, alpha = method.rank_of(path), method.alpha_of(path)
        slices = tuple(place.slice for place in here if place.slice is not None)
        n_in, n_out = kind.dimensions(layer)
        for width in [s.total for s in slices] or [n_out]:
            check_rank(path, rank, n_in, width)
        module = kind(
            layer,
            rank=rank,
            scaling=method.scaling_for(rank, alpha),
            alpha=alpha,
            dropout=method.dropout,
            slices=slices,
            dora=method.dora,
            dtype=dtype,
        )
        module.initialise(layer, method.init)
        modules[path] = module
    if method.tie_head:
        path, module = tied_head(model, modules)
        modules[path] = module
    return modules


def kind_of(layer: nn.Module, model: nn.Module, path: str) -> type[LoRALayer]:
    """The class that adapts this layer.

    Raises:
        TargetError: No kind of adapter fits the layer's type.
    """
    if isinstance(layer, nn.MultiheadAttention):
        return AttentionLoRA
    if isinstance(layer, (nn.Linear, Conv1D)):
        owner = model.get_submodule(path.rpartition(".")[0])
        return OutProjectionLoRA if isinstance(owner, nn.MultiheadAttention) else LinearLoRA
    if isinstance(layer, nn.Embedding):
        return EmbeddingLoRA
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return ConvLoRA
    raise TargetError(
        f"'{path}' is a {type(layer).__name__}, which LoRA cannot adapt. It adapts linear, Conv1D, embedding, "
        "convolution and MultiheadAttention layers; lorakit.targets(model) lists what is there."
    )


def trained_parameters(method: LoRA, model: nn.Module) -> list[str]:
    """Names of the biases and modules that are trained in full beside A and B.

    Raises:
        TargetError: An entry of train_modules names no module, or one that is adapted as well.
    """
    adapted = {place.path for place in resolve_targets(model, method.targets)}
    paths = modules_named(model, method.train_modules)
    for path in paths:
        if any(is_inside(layer, path) for layer in adapted):
            raise TargetError(
                f"'{path}' is trained in full (train_modules) and adapted (targets). Choose one of the two."
            )
    names = [*_bias_names(method, model, adapted), *parameters_below(model, paths)]
    return list(dict.fromkeys(names))


def _bias_names(method: LoRA, model: nn.Module, adapted: set[str]) -> list[str]:
    if method.bias == "none":
        return []
    names = [n for n, _ in model.named_parameters() if not is_of_adapter(n)]
    if method.bias == "all":  # the rule of loralib and PEFT
        names = [name for name in names if "bias" in name]
    else:
        owned = {f"{path}.{bias}" for path in adapted for bias in ("bias", "in_proj_bias")}
        names = [name for name in names if name in owned]
    if not names:
        where = "The model has" if method.bias == "all" else "The adapted layers have"
        raise ConfigurationError(
            f"bias='{method.bias}' asks to train biases. {where} none; use bias='none'."
        )
    return names


def pattern_matches(pattern: str, path: str) -> bool:
    """Whether a rank or alpha pattern covers the module `path`, by PEFT's rule."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def _check_patterns(method: LoRA, paths: list[str]) -> None:
    for name, patterns in (
        ("rank_pattern", method.rank_pattern),
        ("alpha_pattern", method.alpha_pattern),
    ):
        for key in patterns:
            if not any(pattern_matches(key, path) for path in paths):
                raise ConfigurationError(
                    f"{name} has an entry '{key}' that matches none of the {len(paths)} adapted layers "
                    f"(the first is '{paths[0]}')."
                    + nearest(key, {p.rsplit(".", 1)[-1] for p in paths})
                )


def tied_head(model: nn.Module, modules: dict[str, AdapterModule]) -> tuple[str, TiedHeadLoRA]:
    """The path of the output head, and the module that lets the embedding's adapter act on it.

    Raises:
        ConfigurationError: The embedding is not adapted, or the head is not tied to it.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    table, head = (
        getattr(model, name, lambda: None)()
        for name in ("get_input_embeddings", "get_output_embeddings")
    )
    source = modules.get(paths.get(id(table), "")) if table is not None else None
    if not isinstance(source, EmbeddingLoRA):
        raise ConfigurationError(
            "tie_head asks the embedding's adapter to act on the output head, and no target adapts the "
            "input embedding. Add 'embedding' to targets, or leave tie_head out."
        )
    if head is None or table is None or head.weight is not table.weight:
        raise ConfigurationError(
            "tie_head is set, and this model's output head does not share the embedding's weights. "
            "Leave it out; add 'head' to targets to adapt the head as well."
        )
    if paths[id(head)] in modules:
        raise ConfigurationError(
            "tie_head and a target for the head both adapt the output head. Choose one of the two."
        )
    return paths[id(head)], TiedHeadLoRA(head, source)
