"""Hooks that fix the choice of adapters when a forward pass or a generation begins."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lorakit.adapters.activation import Activation
from lorakit.adapters.replaced_methods import OwnMethod, call_replaced
from lorakit.adapters.row_layout import describe_pass
from lorakit.errors import AdapterStateError
from lorakit.models.heads import backbone_of
from lorakit.models.layers import by_token

_ACTIVATION = "_lorakit_activation"
"""Attribute of the model and of its backbone, for the hooks."""


def watch(model: nn.Module, activation: Activation) -> None:
    """Hook a model and its backbone, so that each call fixes its choice of adapters at its start."""
    for module in _entries(model):
        setattr(module, _ACTIVATION, activation)
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


@by_token
def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Forward pre-hook of a model: begin a pass."""
    if torch.compiler.is_compiling():
        return  # a compiled graph is specialised to its choice
    activation: Activation = module.__dict__[_ACTIVATION]
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


@by_token
def leave(module: nn.Module, args: tuple, output: Any) -> None:
    """Forward hook of a model, called after errors too: end the pass."""
    if not torch.compiler.is_compiling():
        module.__dict__[_ACTIVATION].running.end(sys._getframe(1))


def generate(model: nn.Module, own: OwnMethod, *args: Any, **kwargs: Any) -> Any:
    """Call the model's own `generate`, all of whose forward passes keep the choice of its first."""
    activation: Activation | None = model.__dict__.get(_ACTIVATION)
    if activation is None:  # detached, and a wrapper of the user's still calls this
        return call_replaced(model, "generate", own, *args, **kwargs)
    choice = activation.choice
    if choice.unit == "row":
        choice = choice.repeated(_returned_per_row(model, args, kwargs))
    with activation.generation(choice):
        return call_replaced(model, "generate", own, *args, **kwargs)


def init_continuous_batching(model: nn.Module, own: OwnMethod, *args: Any, **kwargs: Any) -> Any:
    """Call the model's own `init_continuous_batching`, as `generate_batch` and `generate` with a paged cache do.

    Raises:
        AdapterStateError: A `per_sample`, `per_token` or `disabled` block is open: the new thread would not see it.
    """
    activation: Activation | None = model.__dict__.get(_ACTIVATION)
    if activation is not None and activation.users_block is not None:
        raise AdapterStateError(
            "Continuous batching calls the model in a new thread, which does not see per_sample, per_token or "
            "disabled. Leave the block, call activate() with an adapter or None, and generate again."
        )
    return call_replaced(model, "init_continuous_batching", own, *args, **kwargs)


def _returned_per_row(model: Any, args: tuple, kwargs: dict[str, Any]) -> int:
    """Return how many times `generate` repeats each row: for its beams, or for the sequences to return."""
    given = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
    counts = []
    for name in ("num_beams", "num_return_sequences"):
        values = (
            kwargs.get(name),
            *(getattr(c, name, None) for c in (given, model.generation_config)),
        )
        counts.append(next((value for value in values if value is not None), 1))
    return max(counts)


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
