"""What a model gets with its first adapter, and loses with its last one."""

from __future__ import annotations

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from lorakit.adapters import generation, replaced_methods, ties
from lorakit.adapters.activation import Activation
from lorakit.adapters.entry import unwatch, watch
from lorakit.adapters.installed import base_parameters
from lorakit.adapters.replaced_methods import replace_in_owner, replace_method
from lorakit.adapters.save_pretrained import load_beside_adapters, save_pretrained
from lorakit.adapters.statistics import RECORDED, record_statistics
from lorakit.methods.trained import REQUIRED_GRADIENT, gradient_flags
from lorakit.models.quantised import Cleared, allow_training, restore_flags

_REPLACED = {
    (PreTrainedModel, "save_pretrained"): save_pretrained,
    (PyTorchModelHubMixin, "save_pretrained"): save_pretrained,
    (PreTrainedModel, "resize_token_embeddings"): ties.resize_token_embeddings,
    (PreTrainedModel, "tie_weights"): ties.tie_weights,
    (PreTrainedModel, "half"): replaced_methods.cast,
    (PreTrainedModel, "float"): replaced_methods.cast,
    (GenerationMixin, "generate"): generation.generate,
}

# Of the class, because a model cannot tell which other models contain it. On import, because a process that
# unpickles an adapted model never calls `attach`.
for (_kind, _name), _function in _REPLACED.items():
    replace_method(_kind, _name, _function)


def prepare_model(model: nn.Module, activation: Activation) -> list[Cleared]:
    """Put hooks and records on a model, before its first adapter.

    Returns:
        The flags of a quantised base that are cleared until `release_model`.
    """
    # By default Dynamo does not guard on hooks: a compiled graph would silently skip an adapter
    # that is attached later. Drop the graphs compiled until now.
    if torch._dynamo.config.skip_nnmodule_hook_guards:
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        torch._dynamo.reset()
    # By every name, because a merge separates tied parameters.
    setattr(model, REQUIRED_GRADIENT, gradient_flags(model))
    # A class may have a `generate` that does not call that of transformers (MusicGen).
    kind = type(model)
    replace_in_owner(kind, "generate", generation.generate)
    if not isinstance(model, PreTrainedModel):
        replace_in_owner(kind, "save_pretrained", save_pretrained)
        fuse = "fuse_qkv_projections"
        replace_in_owner(kind, fuse, replaced_methods.fuse_qkv_projections, library="diffusers")
    watch(model, activation)
    record_statistics(model)
    model.register_load_state_dict_pre_hook(load_beside_adapters)
    return allow_training(model)  # last: an error above must not leave a flag cleared


def freeze_base(model: nn.Module) -> None:
    """Freeze the base's parameters."""
    for _, parameter in base_parameters(model):
        parameter.requires_grad_(False)
        # No optimizer of the adapter clears it, and gradient clipping would count it.
        parameter.grad = None


def release_model(model: nn.Module, cleared: list[Cleared]) -> None:
    """Undo `prepare_model` and `freeze_base`, after the last adapter has been removed."""
    hooks = model._load_state_dict_pre_hooks
    for key in [k for k, h in hooks.items() if getattr(h, "hook", h) is load_beside_adapters]:
        del hooks[key]
    model.__dict__.pop(RECORDED, None)
    flags = model.__dict__.get(REQUIRED_GRADIENT, {})
    for name, parameter in base_parameters(model):
        parameter.requires_grad_(flags.get(name, parameter.requires_grad))
    model.__dict__.pop(REQUIRED_GRADIENT, None)
    restore_flags(cleared)
    unwatch(model)
