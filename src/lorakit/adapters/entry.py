"""Hooks that fix the choice of adapters when a forward pass begins."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lorakit.adapters.activation import Activation
from lorakit.adapters.row_layout import describe_pass
from lorakit.errors import AdapterStateError
from lorakit.models.heads import backbone_of, output_embeddings
from lorakit.models.layers import ADAPTERS, by_token

_ACTIVATION = "_lorakit_activation"
"""Attribute of the model and of its backbone, for the hooks."""

_OF_PEFT = "peft_config"
"""Attribute that PEFT gives to each model whose layers it wraps; some versions leave it there when they unwrap them."""


def watch(model: nn.Module, activation: Activation) -> None:
    """Hook a model and its backbone, so that each call fixes its choice of adapters at its start."""
    for module in _entries(model):
        setattr(module, _ACTIVATION, activation)
        activation.of_peft += _adapters_of_peft(module)
        module.register_forward_pre_hook(enter, with_kwargs=True)
        module.register_forward_hook(leave, always_call=True)


def unwatch(model: nn.Module) -> None:
    """Undo `watch`."""
    for module in _entries(model):
        module.__dict__.pop(_ACTIVATION, None)
        remove_hooks(module, enter, leave)


def _entries(model: nn.Module) -> list[nn.Module]:
    """Return the model and its backbone, each once."""
    return list(dict.fromkeys((model, backbone_of(model))))


def activation_of(module: nn.Module) -> Activation | None:
    """Return the choice of adapters of a model with a handle, or of its backbone; None for other modules."""
    return module.__dict__.get(_ACTIVATION)


@by_token
def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Forward pre-hook of a model: begin a pass."""
    activation: Activation = module.__dict__[_ACTIVATION]
    if kwargs.get("fused_lm_head") and activation.merged is None:
        _require_unadapted_head(module)
    if torch.compiler.is_compiling():
        return  # a compiled graph is specialised to its choice
    if any(
        all(one is not known for known in activation.of_peft) for one in _adapters_of_peft(module)
    ):
        raise AdapterStateError(
            "PEFT has put an adapter on this model, which has adapters of lorakit: both would act, and PEFT freezes "
            "lorakit's. Load the base again, and put all adapters on it with lorakit.attach and lorakit.load."
        )
    if getattr(module, "_is_replica", False) and activation.has_blocks:
        raise AdapterStateError(
            "nn.DataParallel calls the model in new threads, which do not see per_sample or per_token. Call the model "
            "itself, or use one process for each device."
        )
    with activation.running.lock:  # no other thread changes the adapters in between
        choice = activation.entering()
        of_pass = describe_pass(choice, module, args, kwargs)
        of_pass = replace(of_pass, step=activation.step_of(choice, args, kwargs))
        activation.begin(module, of_pass, sys._getframe(1))


def _adapters_of_peft(module: nn.Module) -> list[Any]:
    """Return the configurations of PEFT's adapters that a model has."""
    configs = module.__dict__.get(_OF_PEFT)
    of_each = configs.values() if isinstance(configs, dict) else ()
    return [config for config in of_each if hasattr(config, "peft_type")]


def _require_unadapted_head(model: nn.Module) -> None:
    """Reject an adapter on the output head in a call of TRL's trainers, which read its weight and do not call it."""
    head = output_embeddings(model)
    adapters: Any = None if head is None else head._modules.get(ADAPTERS)
    if adapters is not None and not adapters.leave_output(head):
        raise AdapterStateError(
            "TRL reads the weight of the output head and does not call the head, so the adapter on it would have no "
            "effect and would not be trained. Leave the head out of the targets, as 'all-linear' does. Or train a copy "
            'of the whole head with LoRA(train_modules="lm_head"), and choose it with activate alone.'
        )


@by_token
def leave(module: nn.Module, args: tuple, output: Any) -> None:
    """Forward hook of a model, called after errors too: end the pass."""
    if not torch.compiler.is_compiling():
        module.__dict__[_ACTIVATION].running.end(sys._getframe(1))


def remove_hooks(module: nn.Module, *functions: Any) -> None:
    """Remove forward hooks and pre-hooks by function, with PyTorch's flags for them."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key in [k for k, hook in hooks.items() if hook in functions]:
            del hooks[key]
            for flags in (
                module._forward_hooks_with_kwargs,
                module._forward_pre_hooks_with_kwargs,
                module._forward_hooks_always_called,
            ):
                flags.pop(key, None)


def foreign_hooks(module: nn.Module) -> Iterable[Any]:
    """Return the forward hooks and pre-hooks of a module without those of `watch`."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return [hook for hook in hooks if hook not in (enter, leave)]
