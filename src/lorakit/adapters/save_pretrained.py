"""`save_pretrained` and `load_state_dict` of a model that carries adapters.

A folder of `save_pretrained` must never load as the base without the adapter. So the base keys hold the merged weights,
which every reader understands, and the adapters' own tensors stand beside them. A layer's mark says that its base keys
contain the effect of an adapter. A model that has the adapter, as in a resumed training run, keeps its own base weights
there and loads the adapter's tensors.

Where no weights can be merged (a bottleneck, virtual tokens, a base that another library than bitsandbytes has
quantised), the folder holds the adapters' tensors alone. A training run resumes from it; `from_pretrained` fails.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from lorakit import storage
from lorakit.adapters.installed import (
    adapted_layers,
    base_parameters,
    base_weights,
    packed_part,
    require_unsharded,
    unmergeable,
)
from lorakit.adapters.layer_adapters import LayerAdapters
from lorakit.adapters.merging import MergedLayer, changed_weights
from lorakit.adapters.replaced_methods import OwnMethod
from lorakit.adapters.statistics import record_loaded
from lorakit.adapters.tensor_checks import equals_base
from lorakit.adapters.ties import separate_names, tied_names, unties
from lorakit.errors import AdapterStateError
from lorakit.formatting import listed
from lorakit.models.layers import ADAPTERS
from lorakit.models.packed import packed_layers
from lorakit.models.parameter_swaps import MARK, base_parameter
from lorakit.models.quantised import QuantisedWeight, quantised_weights, unmarked
from lorakit.models.tree import is_of_adapter, state_dict_key, without_wrappers

_LOG = logging.getLogger(__name__)

CHANGED = 2
"""Value of a layer's mark in a file, if its merged weights differ from the base's; 1 if they do not."""


# --- saving ---------------------------------------------------------------------------------------


def save_pretrained(
    model: nn.Module,
    own: OwnMethod,
    save_directory: str | Path,
    *args: Any,
    state_dict: dict[str, Tensor] | None = None,
    **kwargs: Any,
) -> Any:
    """Write a model of which any part has adapters by its own `save_pretrained`, also that of another library.

    Weights that bitsandbytes quantised are written dequantised, because merged weights are not quantised.

    Raises:
        AdapterStateError: Called inside `per_sample`, where rows have different weights, or on a model that is sharded
            over processes. Or the folder would not load, because an active adapter or the base cannot be merged, and
            `push_to_hub` is set or the class is not one of transformers.
        AdapterFileError: An active adapter or a merged weight holds NaN or infinity.
    """
    if not isinstance(model, PreTrainedModel):
        with _state_dict_is_merged(model):
            return own(save_directory, *args, **kwargs)
    require_unsharded(model)
    missing = _why_not_merged(model)
    if missing and kwargs.get("push_to_hub"):
        raise AdapterStateError(
            f"The pushed folder would not load: {missing}. Push the folder that adapters.save() writes."
        )
    if missing:
        state = _training_state(model)
    else:
        state = adapted_state_dict(model, model.state_dict() if state_dict is None else state_dict)
    config: Any = getattr(model, "config", None)
    tied = getattr(config, "tie_word_embeddings", None)
    if tied and unties(model, state):
        config.tie_word_embeddings = False
    separate_names(tied_names(model), state)
    # Undoing the renames of an architecture's old checkpoints would rename the adapters' keys as well.
    kwargs.setdefault("save_original_format", False)
    try:
        with unmarked(model):
            result = own(save_directory, *args, state_dict=state, **kwargs)
    finally:
        if tied is not None:
            config.tie_word_embeddings = tied
    if missing and (args[0] if args else kwargs.get("is_main_process", True)):
        _prevent_loading(Path(save_directory), missing)
    return result


def _why_not_merged(model: nn.Module) -> str | None:
    """Return why a folder of `save_pretrained` would lack a part of the model; None if it would not."""
    if (packed := packed_part(model)) is not None:
        return f"{packed} is quantised, and its numbers are not written"
    unmerged, _ = next(unmergeable(model), (None, ""))
    return None if unmerged is None else f"the adapter '{unmerged}' is no part of the weights"


def _training_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapters' tensors, and the parameters of the base that the user has unfrozen."""
    state = {
        key: tensor
        for start, _, adapters in _layers(model)
        for key, tensor in adapters.state_dict(prefix=f"{start}{ADAPTERS}.").items()
    }
    _drop_second_names(model, state)
    return state | {name: p.detach() for name, p in base_parameters(model) if p.requires_grad}


def _prevent_loading(folder: Path, missing: str) -> None:
    """Make `from_pretrained` fail on a folder that lacks a part of the model, and warn."""
    path = folder / CONFIG_NAME
    reason = f"none: {missing}. Load the folder of adapters.save()"
    storage.write_json(path, {**storage.read_json(path), "transformers_weights": reason})
    _LOG.warning(
        "%s: training can resume from '%s', but from_pretrained rejects it. To get a folder that loads, call "
        "adapters.save().",
        missing,
        folder,
    )


@contextlib.contextmanager
def _state_dict_is_merged(model: nn.Module) -> Iterator[None]:
    """Let `model.state_dict()` return merged weights, for a `save_pretrained` that takes no state dict.

    A model of transformers inside it is saved by its own `save_pretrained`.

    Raises:
        AdapterStateError: An adapter or a tie would be lost; or the block has not called `model.state_dict()`.
    """
    parts = (part for part in model.modules() if isinstance(part, PreTrainedModel))
    is_read = any(next(adapted_layers(part), None) for part in parts)

    def merge(module: nn.Module, state: dict[str, Tensor], prefix: str, *unused: Any) -> None:
        nonlocal is_read
        is_read = True
        require_unsharded(model)
        if missing := _why_not_merged(model):
            raise AdapterStateError(
                f"The saved folder would load without the adapter: {missing}. Call adapters.save() instead."
            )
        merged = adapted_state_dict(model, dict(state))
        for names in tied_names(model):
            tied = [merged[name] for name in names if name in merged]
            if not all(tensor.equal(tied[0]) for tensor in tied):
                raise AdapterStateError(
                    f"The adapter changes one of the tied weights {listed(names, 3)}, and a model loaded from the "
                    "saved folder would tie them again. Call adapters.save() instead."
                )
        state.clear()
        state.update(merged)

    hook = model.register_state_dict_post_hook(merge)
    try:
        yield
        if not is_read:
            raise AdapterStateError(
                f"save_pretrained() of {type(model).__name__} does not write model.state_dict(), so the folder lacks "
                "the adapter. Delete it, and call merge(keep_base=False) before save_pretrained()."
            )
    finally:
        hook.remove()


@torch.no_grad()
def adapted_state_dict(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `state` with the active adapters merged into the base keys, and a mark for every changed layer.

    Its keys are those of the model without wrappers (`torch.compile` of a block), so that every model loads it.
    """
    merged: dict[str, Tensor] = {}
    marks: dict[str, dict[str, Tensor]] = {}  # by the key of a changed weight
    for start, layer, adapters in _layers(model):
        if adapters.activation.users_block is not None:
            raise AdapterStateError(
                "The model cannot be saved inside per_sample, per_token, using or disabled: rows may have other "
                "weights. Leave the block first."
            )
        blend = adapters.activation.active.blends[0]
        path = start.removesuffix(".")
        changed = changed_weights(path, layer, adapters, blend)
        has_changed = False
        # On a GPU, all merged weights together may not fit beside the base.
        tensors = MergedLayer(path, layer, adapters, changed).tensors(blend)
        for attribute, (W, _, weight) in tensors.items():
            merged[start + attribute] = weight.cpu()
            # PiSSA's initial factors cancel up to rounding.
            has_changed |= not weight.allclose(W.to(weight.dtype))
        if changed:
            mark = torch.tensor([CHANGED if has_changed else 1], dtype=torch.uint8)
            marks[start + changed[0]] = {f"{start}{ADAPTERS}.{MARK}": mark}
    result: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = without_wrappers(key)
        if name not in result:  # else a mark
            result[name] = merged.pop(name, tensor)
        # A file may be split into shards, which are loaded one by one: a mark stays with its weight.
        result |= marks.pop(name, {})
    _dequantise(model, result)
    _drop_second_names(model, result)
    return result


def _dequantise(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Dequantise weights to ``W_q``, in the layout of the layer that bitsandbytes quantised."""
    for key, weight in base_weights(model):
        if not isinstance(weight, QuantisedWeight) or key not in state:
            continue
        # bitsandbytes stores the scales of the packed numbers under these names.
        path = key.removesuffix(".weight")
        scales = (f"{path}.SCB", f"{path}.weight_format")
        for other in [k for k in state if k.startswith(f"{key}.") or k in scales]:
            del state[other]
        held = state[key]
        is_merged = held.is_floating_point() and held.numel() == weight.numel()
        state[key] = weight.in_layout(held) if is_merged else weight.dequantised().cpu()


class _Copy(NamedTuple):
    """A base tensor's trained copy at one place; a tied one has several."""

    base_key: str
    """Key of the base tensor that it replaces while its adapter is active."""
    key: str
    tensor: nn.Parameter
    is_in_use: bool


def _trained_copies(model: nn.Module) -> list[_Copy]:
    """Return the trained copies of base tensors, with their keys in the model without wrappers."""
    return [
        _Copy(
            start + attribute,
            f"{start}{ADAPTERS}.{name}.trained.{attribute}",
            copy,
            layer._parameters[attribute] is copy,
        )
        for start, layer, adapters in _layers(model)
        for name, module in adapters.items()
        for attribute, copy in module.trained.items()
    ]


def _drop_second_names(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Keep one key of each trained copy: the base's key if the copy is in use, because a file holds a tensor once."""
    copies = _trained_copies(model)
    written = {id(copy.tensor) for copy in copies if copy.is_in_use and copy.base_key in state}
    for copy in copies:
        if id(copy.tensor) in written:
            state.pop(copy.key, None)
        written.add(id(copy.tensor))


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, LayerAdapters]]:
    """Yield `adapted_layers` with the start of the layer's keys in place of its path."""
    for path, layer, adapters in adapted_layers(model):
        yield f"{path}." if path else "", layer, adapters


# --- loading --------------------------------------------------------------------------------------


def load_beside_adapters(
    model: nn.Module,
    state_dict: dict[str, Tensor],
    prefix: str,
    metadata: dict[str, Any],
    *unused: Any,
) -> None:
    """Change a state dict so that it loads into a model with adapters; a `load_state_dict` pre-hook of the model.

    Its keys may lack the wrappers of the model's blocks.

    Raises:
        AdapterStateError: An adapter is merged; or the state dict has tensors that no adapter of this model has; or its
            weights contain the effect of an adapter, which would act twice.
    """
    given = [key for key in state_dict if key.startswith(prefix)]
    state = {without_wrappers(key.removeprefix(prefix)): state_dict.pop(key) for key in given}
    layers = [*adapted_layers(model)]
    if state and any(adapters.activation.merged for *_, adapters in layers):
        raise AdapterStateError(
            "An adapter is merged. Loaded base weights would overwrite the merged ones, and new tensors for the "
            "adapter would not change them. Call unmerge() before load_state_dict()."
        )
    if metadata.get("assign_to_params_buffers") and any(a.replaced for *_, a in layers):
        raise AdapterStateError(
            "load_state_dict(assign=True) would separate an active adapter's trained copy from the layer that it is "
            "used in. Load without assign, or call activate(None) first."
        )
    is_of_run = _has_adapter_tensors(model, state)
    _keep_quantised(model, state)
    _keep_base(model, state, is_of_run)
    if is_of_run:
        for path, layer, _ in packed_layers(model):
            # A loader of the layer's own (HQQ) requires its numbers, which the file of a run leaves out.
            if type(layer)._load_from_state_dict is not nn.Module._load_from_state_dict:
                state = {**layer.state_dict(prefix=f"{path}."), **state}
    else:
        record_loaded(model, state)
    state_dict.update({prefix + state_dict_key(model, name): t for name, t in state.items()})


def _keep_base(model: nn.Module, state: dict[str, Tensor], is_of_run: bool) -> None:
    """Load base keys that contain an adapter's effect into the trained copies, never into the base's own parameters.

    The base keys of a marked layer are such. So are those in a file of the trainable parameters alone, where
    `model.named_parameters()` gives a trained copy in use the base's key.

    Raises:
        AdapterStateError: The adapter would act on weights that contain its effect already.
    """
    copies = _trained_copies(model)
    held = {id(copy.tensor) for copy in copies if copy.key in state}
    lacking: dict[str, list[_Copy]] = {copy.base_key: [] for copy in copies}
    for copy in copies:
        if id(copy.tensor) not in held:
            lacking[copy.base_key].append(copy)
    only_trained = is_of_run and all(
        is_of_adapter(key) or len(lacking.get(key, ())) == 1 for key in state
    )
    were_loaded: list[bool] = []  # whether the base has the merged weights of the file
    for start, layer, adapters in _layers(model):
        mark = state.pop(f"{start}{ADAPTERS}.{MARK}", None)
        is_active = bool(adapters.activation.active.names & adapters.keys())
        for attribute, parameter in layer._parameters.items():
            key = start + attribute
            if parameter is None or key not in state:
                continue
            own = lacking.get(key, [])
            if mark is not None and mark.eq(CHANGED).all():
                were_loaded.append(equals_base(state[key], base_parameter(layer, attribute)))
            if mark is not None or only_trained:
                if len(own) == 1 and own[0].is_in_use:
                    continue
                if len(own) == 1:
                    state[own[0].key] = state[key]
                state[key] = parameter.detach()
            elif attribute in adapters.replaced:
                _require_base(key, state[key], adapters.original_data(attribute))
                state[key] = parameter.detach()
            elif is_active and not is_of_run:
                _require_base(key, state[key], parameter)
        if adapters.replaced:  # the live layer has this buffer, so strict loading expects the key
            state[f"{start}{ADAPTERS}.{MARK}"] = getattr(adapters, MARK)
    if were_loaded and all(were_loaded):
        raise AdapterStateError(
            "The base of this model was loaded from a checkpoint that holds the same adapter merged, so the adapter "
            "would act twice. Load the original base, attach the adapter, and resume from the checkpoint."
        )


def _require_base(key: str, loaded: Tensor, base: Tensor) -> None:
    """Reject a weight that differs from the base's where an adapter acts: it may contain the adapter's effect."""
    if not base.is_meta and loaded.data_ptr() != base.data_ptr() and not equals_base(loaded, base):
        raise AdapterStateError(
            f"'{key}' differs from the base's weight, and an adapter acts on this layer. If it is another base's, call "
            "activate(None) before load_state_dict(), and activate the adapter again after it. If it is that of a "
            "merged model, the adapter would act twice: load the file of the checkpoint, which has the adapter's "
            "tensors, by load_state_dict(safetensors.torch.load_file(FILE), strict=False). If it was trained, give "
            "it the key of the trained copy, as model.state_dict() does."
        )


def _has_adapter_tensors(model: nn.Module, state: dict[str, Tensor]) -> bool:
    """Return whether a state dict holds adapters' tensors, and so the state of a training run.

    Raises:
        AdapterStateError: The model's adapters lack one of them; loading with strict=False would ignore it.
    """
    ours = {
        f"{start}{ADAPTERS}.{key}"
        for start, _, adapters in _layers(model)
        for key in (MARK, *adapters.state_dict())
    }
    unknown = {key for key in state if is_of_adapter(key)} - ours
    if unknown:  # unless a module of the base is also called `adapters`
        unknown -= {without_wrappers(key) for key in model.state_dict()}
    if unknown:
        raise AdapterStateError(
            f"'{min(unknown)}' belongs to an adapter, and this layer of the model has no such tensor. Attach the "
            "adapters that the file was saved with, under the same names, before you load it."
        )
    return not ours.isdisjoint(state)


def _keep_quantised(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Keep quantised weights for which the file holds the equal dequantised weight."""
    for path, weight in quantised_weights(model):
        key, packed = f"{path}.weight", weight.packed
        loaded = state.get(key)
        if loaded is None or (loaded.shape, loaded.dtype) == (packed.shape, packed.dtype):
            continue
        if f"{path}.{ADAPTERS}.{MARK}" in state:
            continue
        if loaded.shape != weight.shape or not equals_base(loaded, weight.dequantised()):
            raise AdapterStateError(
                f"'{key}' differs from this model's dequantised {weight.kind} weight: the file was saved from another "
                "base, or from another quantisation of the same one. Load the base that it was saved from."
            )
        state[key] = packed.detach()
