"""Hooks on the model itself, which check the batch of a forward pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.activation import Activation
from lorakit.errors import AdapterStateError
from lorakit.models.heads import backbone_of, output_embeddings
from lorakit.models.layers import ADAPTERS, by_token

_ACTIVATION = "_lorakit_activation"
"""Attribute of the model and of its backbone, for the hook."""

_INPUTS = (
    *("input_ids", "inputs_embeds", "pixel_values", "input_values", "input_features"),
    *("decoder_input_ids", "decoder_inputs_embeds"),
)
"""Arguments of transformers models with one entry for each row."""


def watch(model: nn.Module, activation: Activation) -> None:
    """Hook a model and its backbone."""
    for module in _entries(model):
        setattr(module, _ACTIVATION, activation)
        activation.of_peft += _adapters_of_peft(module)
        module.register_forward_pre_hook(enter, with_kwargs=True)


def unwatch(model: nn.Module) -> None:
    """Undo `watch`."""
    for module in _entries(model):
        module.__dict__.pop(_ACTIVATION, None)
        remove_hooks(module, enter)


def _entries(model: nn.Module) -> list[nn.Module]:
    """Return the model and its backbone, each once."""
    return list(dict.fromkeys((model, backbone_of(model))))


def activation_of(module: nn.Module) -> Activation | None:
    """Return the choice of adapters of a model with a handle, or of its backbone; None for other modules."""
    return module.__dict__.get(_ACTIVATION)


@by_token
def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Forward pre-hook of a model: check that its batch has the rows or tokens of the choice.

    Raises:
        AdapterStateError: It does not. Or TRL would read the weight of an adapted head without calling the head. Or
            PEFT has put an adapter on the model since. Or the model is a replica of `nn.DataParallel`.
    """
    activation: Activation = module.__dict__[_ACTIVATION]
    known = {id(config) for config in activation.of_peft}
    if any(id(config) not in known for config in _adapters_of_peft(module)):
        raise AdapterStateError(
            "PEFT has put an adapter on this model, which has adapters of lorakit: both would act, and PEFT freezes "
            "lorakit's. Load the base again, and put all adapters on it with lorakit.attach and lorakit.load."
        )
    if getattr(module, "_is_replica", False) and activation.has_blocks:
        raise AdapterStateError(
            "nn.DataParallel splits the batch over new threads, which do not see per_sample, per_token, using or "
            "disabled. Call the model itself, or use one process for each device."
        )
    if kwargs.get("fused_lm_head") and activation.merged is None:
        _require_unadapted_head(module)
    choice = activation.current().choice  # a checkpoint around the model records it
    if torch.compiler.is_compiling() or choice.unit == "batch":
        return
    tensors = (*(kwargs.get(name) for name in _INPUTS), *args[:1])
    x = next((x for x in tensors if isinstance(x, Tensor) and x.ndim), None)
    if x is None or not x.numel():
        return
    if choice.unit == "token":
        if x.ndim > 1 and x.shape[:2].numel() != sum(choice.tokens):
            raise AdapterStateError(
                f"per_token names {sum(choice.tokens)} tokens, and {type(module).__name__} received an input of shape "
                f"{tuple(x.shape)}. Give one span for each stretch of its {x.shape[:2].numel()} tokens."
            )
    elif len(x) not in choice.rows:
        raise AdapterStateError(
            f"per_sample names {len(choice.blends)} rows, and {type(module).__name__} received a batch of {len(x)}. "
            "Give one name (or None) for each row of the batch. If each row comes several times in a row, say "
            "per_sample(names, repeat=...)."
        )


def _adapters_of_peft(module: nn.Module) -> list[Any]:
    """Return the configurations of PEFT's adapters on a model; some versions leave them there after `unload`."""
    configs = module.__dict__.get("peft_config")
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
    return [hook for hook in hooks if hook is not enter]
