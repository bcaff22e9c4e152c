"""The forward hooks on adapted layers.

They are module-level functions and find their state on the layer, so deepcopy and pickle work.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from lorakit.adapters.activation import Activation
from lorakit.adapters.entry import foreign_hooks, remove_hooks
from lorakit.adapters.layer_adapters import LayerAdapters, after_forward
from lorakit.adapters.row_layout import RowLayout
from lorakit.methods.module import AdapterModule, ModuleHook
from lorakit.models.layers import ADAPTERS
from lorakit.models.parameter_swaps import hide_parameters, show_parameters
from lorakit.models.tree import base_modules


def shadow_weights(caller: nn.Module, args: tuple) -> None:
    """Forward pre-hook of a module that reads adapted weights directly: hide them by the effective weights."""
    for layer in _read_by(caller):
        hide_parameters(layer, layer.adapters.effective_weights)  # type: ignore[union-attr]


def unshadow_weights(caller: nn.Module, args: tuple, output: Any) -> None:
    """Forward hook that also runs after an exception: show the layer's own weights again."""
    for layer in _read_by(caller):
        show_parameters(layer)


def _read_by(caller: nn.Module) -> list[nn.Module]:
    """Return the adapted layers whose weights `caller` reads: itself, and the output projection of attention."""
    layers = [caller]
    if isinstance(caller, nn.MultiheadAttention):
        layers.append(caller.out_proj)
    return [layer for layer in layers if ADAPTERS in layer._modules]


def add_module(
    layer: nn.Module,
    owner: nn.Module,
    name: str,
    module: AdapterModule,
    activation: Activation,
    layout: RowLayout | None,
) -> None:
    """Add an adapter's module to a layer inside `owner`, with the `adapters` child and the hooks that it needs.

    `layout` may be None for a layer that already has an adapter.
    """
    if ADAPTERS not in layer._modules:
        assert layout is not None
        adapters = LayerAdapters(layer, activation, layout).train(layer.training)
        layer.register_module(ADAPTERS, adapters)
        layer.register_forward_hook(after_forward, with_kwargs=True)
    layer.adapters[name] = module  # type: ignore[index, operator, union-attr]
    add_hooks(layer, module.layer_hooks)
    module.train(layer.training)
    caller = owner if isinstance(owner, nn.MultiheadAttention) else layer
    reads_weights = isinstance(caller, nn.MultiheadAttention) or module.shadows
    if reads_weights and shadow_weights not in caller._forward_pre_hooks.values():
        caller.register_forward_pre_hook(shadow_weights)
        caller.register_forward_hook(unshadow_weights, always_call=True)


def output_is_unadapted(layer: nn.Module) -> bool:
    """Return whether the layer computes its output from its own (or trained) parameters, and no hook changes it."""
    hooks = foreign_hooks(layer)
    adapters = layer._modules.get(ADAPTERS)
    if hooks == [after_forward] and isinstance(adapters, LayerAdapters):
        return adapters.leave_output(layer)
    return not hooks


def hooks_act_by_token(layer: nn.Module) -> bool:
    """Return whether no hook on the layer mixes tokens."""
    for hook in (*layer._forward_pre_hooks.values(), *layer._forward_hooks.values()):
        if hook is after_forward:
            acting = layer.adapters.acting(layer)  # type: ignore[operator, union-attr]
            if acting is None or not all(m.by_token or m.leaves_output for m in acting):
                return False
        elif not (getattr(hook, "by_token", False) or _is_of_fsdp(hook)):
            return False
    return True


def _is_of_fsdp(hook: Any) -> bool:
    """Whether a hook gathers and drops the weights of a module, and leaves its input and output as they are."""
    return (getattr(hook, "__module__", None) or "").startswith("torch.distributed.fsdp")


def add_hooks(module: nn.Module, hooks: Iterable[ModuleHook]) -> None:
    """Register the hooks that an adapter's module declares, each once."""
    for hook in hooks:
        if hook.before and hook.run not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(hook.run, with_kwargs=True)
        elif not hook.before and hook.run not in module._forward_hooks.values():
            module.register_forward_hook(hook.run)


def remove_adapter(layer: nn.Module, adapters: LayerAdapters, name: str) -> None:
    """Remove one of a layer's adapters, with the hooks that no other adapter on it needs."""
    show_parameters(layer)  # after an interrupted call
    removed = adapters[name]
    del adapters[name]
    needed = {hook for module in adapters.values() for hook in module.layer_hooks}
    remove_hooks(layer, *(hook.run for hook in {*removed.layer_hooks} - needed))
    if not adapters:
        del layer._modules[ADAPTERS]
        remove_hooks(layer, after_forward)


def remove_idle_hooks(model: nn.Module) -> None:
    """Remove the hooks of modules that no longer read an adapted weight."""
    for _, module in base_modules(model):
        if shadow_weights in module._forward_pre_hooks.values() and not _read_by(module):
            remove_hooks(module, shadow_weights, unshadow_weights)
