"""`load_state_dict` into a model that carries adapters.

A file of `lorakit.adapters.export` holds merged weights under the base keys of each marked layer, beside the adapter's
tensors. A model that has the adapter, as in a resumed training run, keeps its own base weights there. Pre-hooks of
`load_state_dict` do this, also for a part of the model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.entry import activation_of
from lorakit.adapters.installed import adapted_layers
from lorakit.adapters.layer_adapters import LayerAdapters
from lorakit.adapters.statistics import record_loaded, records_statistics
from lorakit.errors import AdapterStateError
from lorakit.models.layers import ADAPTERS
from lorakit.models.packed import packed_layers
from lorakit.models.parameter_swaps import MARK, base_parameter, named_base_parameters
from lorakit.models.quantised import quantised_weights
from lorakit.models.tree import (
    base_modules,
    is_of_adapter,
    key_start,
    state_dict_key,
    without_wrappers,
)

CHANGED = 2
"""Value of a layer's mark in a file, if its merged weights differ from the base's; 1 if they do not."""


def guard_loading(model: nn.Module) -> None:
    """Register the `load_state_dict` pre-hooks that the model's adapters need, and remove all others of ours.

    Every module that contains an adapted layer gets `check_loading`, so that a refused load of the model, or of a part
    of it, changes nothing. So does every module with recorded running statistics.
    """
    contains: dict[int, bool] = {}

    def needs_check(module: nn.Module) -> bool:
        if id(module) not in contains:
            contains[id(module)] = records_statistics(module) or any(
                isinstance(child, LayerAdapters) or needs_check(child)
                for child in module.children()
            )
        return contains[id(module)]

    for _, module in base_modules(model):
        adapted = isinstance(module._modules.get(ADAPTERS), LayerAdapters)
        _register_loading(module, check_loading, needs_check(module))
        _register_loading(module, keep_base_weights, adapted)


def _register_loading(module: nn.Module, hook: Callable[..., None], wanted: bool) -> None:
    hooks = module._load_state_dict_pre_hooks
    registered = [key for key, h in hooks.items() if getattr(h, "hook", h) is hook]
    if wanted and not registered:
        module.register_load_state_dict_pre_hook(hook)
    for key in registered if not wanted else ():
        del hooks[key]


def check_loading(
    module: nn.Module,
    state_dict: dict[str, Tensor],
    prefix: str,
    metadata: dict[str, Any],
    *unused: Any,
) -> None:
    """Reject a state dict whose tensors would be lost or would overwrite an adapter's; a `load_state_dict` pre-hook.

    Replaces dequantised weights in `state_dict` by the packed ones that they equal, gives trained copies their own
    keys, and records running statistics of a base.

    Raises:
        AdapterStateError: An adapter is merged; or base weights differ from those that an active adapter's trained
            copy replaces; or the file holds tensors that no adapter of this model has; or the base was loaded from the
            file itself; or the weights are those of a merged model.
    """
    _add_wrappers(module, state_dict, prefix)
    _name_trained_copies(module, state_dict, prefix)
    _refuse_unknown_tensors(module, state_dict, prefix)
    _refuse_merged_base(module, state_dict, prefix)
    adapted = [*adapted_layers(module)]
    is_merged = any(adapters.activation.merged for *_, adapters in adapted)
    if is_merged and any(key.startswith(prefix) for key in state_dict):
        raise AdapterStateError(
            "An adapter is merged. Loaded base weights would overwrite the merged ones, and new tensors for the "
            "adapter would not change them. Call unmerge() before load_state_dict()."
        )
    _keep_quantised(module, state_dict, prefix)
    # With an adapter's tensors it is the state of a training run, whose weights and statistics are not the base's.
    is_base = not any(is_of_adapter(key.removeprefix(prefix)) for key in state_dict)
    # In a part of another base, such as one attention, the adapted layers may be the only ones that differ.
    if is_base and activation_of(module) is not None:
        _refuse_merged_weights(module, state_dict, prefix)
    for path, _, adapters in adapted:
        start = prefix + key_start(module, path)
        if adapters.replaced and metadata.get("assign_to_params_buffers"):
            raise AdapterStateError(
                "load_state_dict(assign=True) would separate an active adapter's trained copy from the layer that it "
                "is used in. Load without assign, or call activate(None) first."
            )
        if f"{start}{ADAPTERS}.{MARK}" in state_dict:
            continue
        for attribute in adapters.replaced:
            key = start + attribute
            if key in state_dict and not equals_base(
                state_dict[key], adapters.original_data(attribute)
            ):
                raise AdapterStateError(
                    f"'{key}' differs from the base's weight, and an active adapter has replaced that one by its "
                    "trained copy. If it is another base's, call activate(None) before load_state_dict(), and activate "
                    "the adapter again after it. If it was trained, give it the key of the copy, "
                    f"'{start}{ADAPTERS}.NAME.trained.{attribute}', as model.state_dict() does."
                )
    # A part without adapted layers cannot tell whose statistics they are, so the module around it decides.
    if is_base and (adapted or not prefix):
        record_loaded(module, state_dict, prefix)
    _skip_packed(module, state_dict, prefix, is_of_run=not is_base)


def _add_wrappers(module: nn.Module, state_dict: dict[str, Tensor], prefix: str) -> None:
    """Give tensors of a file without wrappers the keys that they have in a model with wrapped parts."""
    for key in [key for key in state_dict if key.startswith(prefix)]:
        name = key.removeprefix(prefix)
        own = prefix + state_dict_key(module, name)
        if name == without_wrappers(name) and own not in state_dict:
            state_dict[own] = state_dict.pop(key)


def _name_trained_copies(model: nn.Module, state_dict: dict[str, Tensor], prefix: str) -> None:
    """Give the trained copies in a file of the trainable parameters their own keys.

    `model.named_parameters()` names the copy in use by the base's key. A file is one of trainable parameters if it has
    an adapter's tensors, and base keys for trained parameters alone.
    """
    keys: dict[str, list[str]] = {}  # of the copies, by the base's key
    for path, _, adapters in adapted_layers(model):
        start = prefix + key_start(model, path)
        if f"{start}{ADAPTERS}.{MARK}" not in state_dict:
            for name, module in adapters.items():
                for a in module.trained:
                    own = f"{start}{ADAPTERS}.{name}.trained.{a}"
                    if own not in state_dict:
                        keys.setdefault(start + a, []).append(own)
    names = {key: own for key, [own, *more] in keys.items() if not more}
    if not names:
        return
    of_base = {key for key in state_dict if not is_of_adapter(key.removeprefix(prefix))}
    if len(of_base) < len(state_dict) and of_base <= names.keys():
        for key in of_base:
            state_dict[names[key]] = state_dict.pop(key)


def equals_base(loaded: Tensor, base: Tensor) -> bool:
    """Return whether the numbers are equal once those of the wider dtype are rounded to the other."""
    return not base.is_meta and (loaded.to(base).equal(base) or loaded.equal(base.to(loaded)))


def keep_base_weights(
    layer: nn.Module, state_dict: dict[str, Tensor], prefix: str, *unused: Any
) -> None:
    """Load only those base keys of an adapted layer that belong in its parameters; a `load_state_dict` pre-hook.

    Base keys of a marked layer contain the effect of an adapter. They belong in a trained copy, never in a parameter of
    the base. Base keys without a mark never belong in a trained copy.
    """
    adapters = layer.adapters
    assert isinstance(adapters, LayerAdapters)
    mark = f"{prefix}{ADAPTERS}.{MARK}"
    marked = state_dict.pop(mark, None) is not None
    if marked:
        # A trained copy that was active when the file was written is stored under the base key only.
        for name, module in adapters.items():
            for attribute, copy in module.trained.items():
                key = f"{prefix}{ADAPTERS}.{name}.trained.{attribute}"
                if layer._parameters[attribute] is not copy and prefix + attribute in state_dict:
                    state_dict.setdefault(key, state_dict[prefix + attribute])
    copies = {id(copy) for module in adapters.values() for copy in module.trained.values()}
    for attribute, parameter in layer._parameters.items():
        key = prefix + attribute
        if parameter is not None and key in state_dict and marked != (id(parameter) in copies):
            state_dict[key] = parameter.detach()
    if adapters.replaced:  # the live layer has this buffer, so strict loading expects the key
        state_dict[mark] = getattr(adapters, MARK)


_LOAD = "_load_from_state_dict"
"""The method by which PyTorch loads the tensors of one module."""


def _skip_packed(
    model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *, is_of_run: bool
) -> None:
    """Let packed layers keep their numbers, which the file of a training run leaves out (`lorakit.adapters.export`).

    Their own method would raise an error for the missing tensors, or take the layer for one that is not quantised.
    """
    for path, layer, _ in packed_layers(model):
        start = prefix + key_start(model, path)
        own = {key.removeprefix(start) for key in state_dict if key.startswith(start)}
        layer.__dict__.pop(_LOAD, None)  # of a call that an error or interrupt has ended
        if is_of_run and all(name == "bias" or is_of_adapter(name) for name in own):
            layer.__dict__[_LOAD] = functools.partial(_load_bias, layer)


@torch.no_grad()
def _load_bias(layer: nn.Module, state_dict: dict[str, Tensor], prefix: str, *others: Any) -> None:
    """Load the bias alone, after the layer's pre-hooks, and give the layer its own method again."""
    for hook in layer._load_state_dict_pre_hooks.values():  # `check_loading` may be one of them
        hook(state_dict, prefix, *others)
    layer.__dict__.pop(_LOAD, None)
    bias = layer._parameters.get("bias")
    if bias is not None and (loaded := state_dict.get(f"{prefix}bias")) is not None:
        bias.copy_(loaded)


def _keep_quantised(model: nn.Module, state_dict: dict[str, Tensor], prefix: str) -> None:
    """Keep quantised weights for which the file holds the equal dequantised weight."""
    for path, weight in quantised_weights(model):
        start = prefix + key_start(model, path)
        key = f"{start}weight"
        in_file = state_dict.get(key)
        packed = weight.packed
        if in_file is None or (in_file.shape, in_file.dtype) == (packed.shape, packed.dtype):
            continue
        if f"{start}{ADAPTERS}.{MARK}" in state_dict:  # `keep_base_weights` keeps it
            continue
        if not (
            in_file.shape == weight.shape and in_file.to(packed.device).equal(weight.dequantised())
        ):
            raise AdapterStateError(
                f"'{key}' differs from this model's dequantised {weight.kind} weight: the file was saved from another "
                "base, or from another quantisation of the same one. Load the base that it was saved from."
            )
        state_dict[key] = packed.detach()


def _refuse_unknown_tensors(model: nn.Module, state_dict: dict[str, Tensor], prefix: str) -> None:
    """Reject adapter tensors that the model's adapters do not have; loading with strict=False would ignore them."""
    keys = [key for key in state_dict if is_of_adapter(key.removeprefix(prefix))]
    if not keys:
        return
    known: dict[str, set[str] | None] = {}  # None for a module of the base with this name
    for path, module in base_modules(model, remove_duplicate=False):
        if (slot := module._modules.get(ADAPTERS)) is not None:
            own = {MARK, *slot.state_dict()} if isinstance(slot, LayerAdapters) else None
            known[f".{state_dict_key(model, path)}" if path else path] = own
    for key in keys:
        path, _, name = f".{key.removeprefix(prefix)}".partition(f".{ADAPTERS}.")
        names = known.get(path, set())
        if names is not None and name not in names:
            raise AdapterStateError(
                f"'{key}' belongs to an adapter, and this layer of the model has no such tensor. Attach the adapters "
                "that the file was saved with, under the same names, before you load it."
            )


def _refuse_merged_base(model: nn.Module, state_dict: dict[str, Tensor], prefix: str) -> None:
    """Reject the file of a base that was loaded from it, and so contains the adapter's effect already."""
    merged = {}
    for path, layer, _ in adapted_layers(model):
        start = prefix + key_start(model, path)
        mark = state_dict.get(f"{start}{ADAPTERS}.{MARK}")
        if mark is not None and not mark.is_meta and bool(mark.eq(CHANGED).all()):
            merged[start] = layer
    if merged and all(_equals_file(layer, state_dict, start) for start, layer in merged.items()):
        raise AdapterStateError(
            "The base of this model was loaded from a checkpoint that holds the same adapter merged, so the adapter "
            "would act twice. Load the original base, attach the adapter, and resume from the checkpoint."
        )
    for start in merged:  # the modules inside this one need no check of their own
        state_dict[f"{start}{ADAPTERS}.{MARK}"] = torch.ones(1, dtype=torch.uint8)


def _refuse_merged_weights(model: nn.Module, state_dict: dict[str, Tensor], prefix: str) -> None:
    """Reject the weights of a merged model: they differ from the base's at layers with an active adapter alone.

    Those of another base, such as a fine-tuned one or an average, differ at other layers too.
    """
    adapted = {
        id(base_parameter(layer, attribute))
        for _, layer, adapters in adapted_layers(model)
        if adapters.activation.active.names & adapters.keys()
        for attribute in layer._parameters
    }

    def differences(*, is_adapted: bool) -> Iterator[bool]:
        for name, _, parameter in named_base_parameters(model):
            loaded = state_dict.get(prefix + state_dict_key(model, name))
            if loaded is not None and (id(parameter) in adapted) == is_adapted:
                yield not equals_base(loaded, parameter)

    elsewhere = differences(is_adapted=False)
    if any(differences(is_adapted=True)) and not next(elsewhere, True) and not any(elsewhere):
        raise AdapterStateError(
            "The weights to load differ from the base's at the adapted layers alone. If they are a new base, call "
            "activate(None) before load_state_dict(), and activate the adapter again after it. If they are those of a "
            "merged model, the adapter would act twice: load the file of the checkpoint, which has the adapter's "
            "tensors, by load_state_dict(safetensors.torch.load_file(FILE), strict=False)."
        )


def _equals_file(layer: nn.Module, state_dict: dict[str, Tensor], start: str) -> bool:
    """Return whether the base's own parameters of a layer are those of the file."""
    attributes = [
        a for a, p in layer._parameters.items() if p is not None and start + a in state_dict
    ]
    return bool(attributes) and all(
        equals_base(state_dict[start + a], base_parameter(layer, a)) for a in attributes
    )
