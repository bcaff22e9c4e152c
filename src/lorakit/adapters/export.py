"""`save_pretrained` and `load_state_dict` of a model that carries adapters.

A folder written by `save_pretrained` must never load as the base without the adapter. So the base keys
hold the merged weights, which every reader understands. The file also holds the adapter's own tensors, and a
mark for each adapted layer. A model that has the adapter (a resumed training run) keeps its own base weights
for marked layers when it loads such a file. Pre-hooks of `load_state_dict` do this, also for a part of the model.

An adapter that cannot be merged (a bottleneck, virtual tokens) leaves the base weights in the base keys.
The configuration of such a folder names no weight file, so `from_pretrained` fails on it. A resumed training
run loads the tensors itself.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import CONFIG_NAME

from lorakit import storage
from lorakit.adapters.choice import Blend
from lorakit.adapters.entry import is_entry
from lorakit.adapters.installed import (
    adapted_layers,
    base_weights,
    require_unsharded,
    unmergeable,
)
from lorakit.adapters.layer_adapters import LayerAdapters
from lorakit.adapters.replaced_methods import OwnMethod
from lorakit.adapters.statistics import record_loaded, records_statistics
from lorakit.errors import AdapterStateError
from lorakit.models.dtypes import check_tensor
from lorakit.models.layers import (
    ADAPTERS,
    base_modules,
    is_of_adapter,
    key_start,
    state_dict_key,
    without_wrappers,
)
from lorakit.models.parameter_swaps import (
    MARK,
    base_parameter,
    grouped_base_parameters,
    named_base_parameters,
)
from lorakit.models.quantised import QuantisedWeight, quantised_weights, unmarked

_LOG = logging.getLogger(__name__)

_CHANGED = 2
"""Value of a layer's mark in a file, if its merged weights differ from the base's; 1 if they do not."""


def save_pretrained(
    model: nn.Module,
    own: OwnMethod,
    save_directory: str | Path,
    *args: Any,
    state_dict: dict[str, Tensor] | None = None,
    **kwargs: Any,
) -> Any:
    """Write a model of which any part has adapters by its own `save_pretrained`.

    The written weights are never quantised, also for a quantised base, because merged weights are not.

    Raises:
        AdapterStateError: Called inside `per_sample`, where rows have different weights, or on a model that is sharded
            over processes. Or `push_to_hub` is set and an active adapter cannot be merged, so the base would be pushed
            without it.
        AdapterFileError: An active adapter or a merged weight holds NaN or infinity.
    """
    require_unsharded(model)
    unmerged, _ = next(unmergeable(model), (None, ""))
    if unmerged and kwargs.get("push_to_hub"):
        raise AdapterStateError(
            f"'{unmerged}' cannot be merged into the weights, so the base would be pushed without it. Push the folder "
            "that adapters.save() writes."
        )
    state = adapted_state_dict(model, model.state_dict() if state_dict is None else state_dict)
    config: Any = getattr(model, "config", None)
    tied = getattr(config, "tie_word_embeddings", None)
    if tied and unties(model, state):
        config.tie_word_embeddings = False
    separate_names(tied_names(model), state)
    # Undoing the renames of an architecture's old checkpoints would rename the adapters' keys as well.
    kwargs.setdefault("save_original_format", False)
    try:
        with unmarked(model), _configuration_prevents_loading(config, unmerged):
            return own(save_directory, *args, state_dict=state, **kwargs)
    finally:
        if tied is not None:
            config.tie_word_embeddings = tied
        is_main_process = args[0] if args else kwargs.get("is_main_process", True)
        if unmerged and is_main_process:
            _prevent_loading(Path(save_directory), unmerged)


def _without_weights(record: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a model's configuration that makes `from_pretrained` fail, with the reason."""
    reason = (
        f"none: the adapter '{name}' is no part of the weights. Load the folder of adapters.save()"
    )
    return {**record, "transformers_weights": reason}


@contextlib.contextmanager
def _configuration_prevents_loading(config: Any, name: str | None) -> Iterator[None]:
    """Make `save_pretrained` write a configuration on which `from_pretrained` fails.

    transformers writes it before the weights. So the folder does not load while it has the weights of an earlier save,
    or if the process is killed before the end.
    """
    if config is None or name is None:
        yield
        return

    def to_json_file(path: str | Path, use_diff: bool = True) -> None:
        del config.__dict__["to_json_file"]  # it would be written too
        record = json.loads(config.to_json_string(use_diff=use_diff))
        config.__dict__["to_json_file"] = to_json_file
        storage.write_json(path, _without_weights(record, name))

    config.__dict__["to_json_file"] = to_json_file
    try:
        yield
    finally:
        config.__dict__.pop("to_json_file", None)


def _prevent_loading(folder: Path, name: str) -> None:
    """Make `from_pretrained` fail on a folder that holds the base without the adapter, and warn."""
    path = folder / CONFIG_NAME
    if path.exists():
        # A class with a `save_pretrained` of its own may have written it in another way.
        storage.write_json(path, _without_weights(storage.read_json(path), name))
    _LOG.warning(
        "'%s' cannot be merged into the weights: training can resume from '%s', but from_pretrained rejects it. "
        "To get a folder that loads, call adapters.save().",
        name,
        folder,
    )


@torch.no_grad()
def adapted_state_dict(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `state` with the active adapters merged into the base keys, and a mark for every changed layer.

    Its keys are those of the model without wrappers (`torch.compile` of a block), so that every model loads it.
    """
    result = {without_wrappers(key): tensor for key, tensor in state.items()}
    replaced = set()  # keys whose weight is a merged or trained one, which is never quantised
    for path, layer, adapters in adapted_layers(model):
        if adapters.activation.users_block is not None:
            raise AdapterStateError(
                "The model cannot be saved inside per_sample, per_token, using or disabled: rows may have other "
                "weights. Leave the block first."
            )
        blend = adapters.activation.active.blends[0]
        prefix = f"{path}." if path else ""
        names, has_changed = [name for name, _ in blend], False
        for attribute in adapters.weights_changed_by(path, layer, names):
            # On a GPU, all merged weights together may not fit beside the base.
            result[prefix + attribute], is_changed = _merged(adapters, layer, attribute, blend)
            check_tensor(f"the merged '{prefix}{attribute}'", result[prefix + attribute])
            has_changed |= is_changed
            mark = _CHANGED if has_changed else 1
            result[f"{prefix}{ADAPTERS}.{MARK}"] = torch.tensor([mark], dtype=torch.uint8)
            replaced.add(prefix + attribute)
        replaced.update(prefix + attribute for attribute in adapters.replaced)
    _expand_quantised(model, result, replaced)
    # A copy of a base tensor may have several keys (the base's own, and every tied one): write it once.
    copies = _copies(model)
    seen = {id(p) for name, p in model.named_parameters() if without_wrappers(name) not in copies}
    for key, parameter in copies.items():
        if id(parameter) in seen:
            result.pop(key, None)
        seen.add(id(parameter))
    return result


def _merged(
    adapters: LayerAdapters, layer: nn.Module, attribute: str, blend: Blend
) -> tuple[Tensor, bool]:
    """Return a merged weight on the CPU, and whether it differs from the weight without the adapters."""
    W, _, merged = adapters.merge_weight(layer, attribute, blend)
    is_equal = merged.allclose(W.to(merged.dtype))  # PiSSA's initial factors cancel up to rounding
    return merged.cpu(), not is_equal


def _expand_quantised(model: nn.Module, state: dict[str, Tensor], replaced: set[str]) -> None:
    """Dequantise weights to ``W_q``, in the layout of the layer that was quantised."""
    for key, weight in base_weights(model):
        if not isinstance(weight, QuantisedWeight) or key not in state:
            continue
        # bitsandbytes stores the scales of the packed numbers under these names.
        path = key.removesuffix(".weight")
        scales = (f"{path}.SCB", f"{path}.weight_format")
        for other in [k for k in state if k.startswith(f"{key}.") or k in scales]:
            del state[other]
        state[key] = weight.in_layout(state[key]) if key in replaced else weight.dequantised().cpu()


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
    if is_base and is_entry(module):
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
                    keys.setdefault(start + a, []).append(f"{start}{ADAPTERS}.{name}.trained.{a}")
    names = {key: own for key, [own, *more] in keys.items() if not more and own not in state_dict}
    of_base = {key for key in state_dict if not is_of_adapter(key.removeprefix(prefix))}
    if len(of_base) < len(state_dict) and of_base <= names.keys():
        for key in of_base:
            state_dict[names[key]] = state_dict.pop(key)


def equals_base(loaded: Tensor, base: Tensor) -> bool:
    """Return whether the numbers are equal, or equal once rounded to the base's dtype."""
    return not base.is_meta and loaded.to(base).equal(base)


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
        if mark is not None and not mark.is_meta and bool(mark.eq(_CHANGED).all()):
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
            "The weights to load differ from the base's at the adapted layers alone: they are those of a merged model, "
            "so the adapter would act twice. To resume from a checkpoint, load its file, which has the adapter's "
            "tensors: load_state_dict(safetensors.torch.load_file(FILE), strict=False). If the weights are a new base, "
            "call activate(None) before load_state_dict(), and activate the adapter again after it."
        )


def _equals_file(layer: nn.Module, state_dict: dict[str, Tensor], start: str) -> bool:
    """Return whether the base's own parameters of a layer are those of the file."""
    attributes = [
        a for a, p in layer._parameters.items() if p is not None and start + a in state_dict
    ]
    return bool(attributes) and all(
        equals_base(state_dict[start + a], base_parameter(layer, a)) for a in attributes
    )


def tied_names(model: nn.Module) -> list[list[str]]:
    """Return the names of each parameter that several layers of the base share."""
    return [names for names, *_ in grouped_base_parameters(model) if len(names) > 1]


def unties(model: nn.Module, state: dict[str, Tensor]) -> bool:
    """Return whether `state` has different tensors for all names that the base ties.

    Only then may `tie_word_embeddings` be cleared: transformers does not save names that are still tied, and without
    the setting it would initialise them randomly. With the setting, it ties no names whose tensors differ.
    """
    groups = [[state[n].data_ptr() for n in names if n in state] for names in tied_names(model)]
    return bool(groups) and all(len({*group}) == len(group) for group in groups)


def separate_names(groups: list[list[str]], tensors: dict[str, Tensor]) -> None:
    """Give each name of a tied parameter a tensor of its own in `tensors`, unless all names still have the same.

    transformers saves tensors that share memory once, under the name in its table of tied weights. While all names of
    this table agree, that is enough. T5 ties four names, and without this a file would lack the two embeddings that
    are still one.
    """
    for names in groups:
        present = [name for name in names if name in tensors]
        if len({tensors[name].data_ptr() for name in present}) > 1:
            seen = set()
            for name in present:
                if (address := tensors[name].data_ptr()) in seen:
                    tensors[name] = tensors[name].clone()
                seen.add(address)


def _copies(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained copies of base tensors by their keys in the model; one of a tied tensor under every key."""
    copies = {}
    for path, _, adapters in adapted_layers(model):
        for name, module in adapters.items():
            for attribute, copy in module.trained.items():
                key = f"{ADAPTERS}.{name}.trained.{attribute}"
                copies[f"{path}.{key}" if path else key] = copy
    return copies
