"""`save_pretrained` of a model that carries adapters.

A folder written by it must never load as the base without the adapter. So the base keys hold the merged weights,
which every reader understands. The file also holds the adapter's own tensors, and a mark for each adapted layer, by
which a model that has the adapter recognises it (`lorakit.adapters.state_loading`).

An adapter that cannot be merged (a bottleneck, virtual tokens) leaves the base weights in the base keys, and a layer
that another library than bitsandbytes has quantised leaves its own out. The configuration of such a folder names no
weight file, so `from_pretrained` fails on it. A resumed training run loads the tensors itself.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from lorakit import storage
from lorakit.adapters.installed import (
    adapted_layers,
    base_weights,
    packed_part,
    require_unsharded,
    unmergeable,
)
from lorakit.adapters.merging import MergedLayer, changed_weights
from lorakit.adapters.replaced_methods import OwnMethod
from lorakit.adapters.state_loading import CHANGED
from lorakit.adapters.ties import separate_names, tied_names, unties
from lorakit.errors import AdapterStateError
from lorakit.formatting import listed
from lorakit.models.layers import ADAPTERS, packs_numbers
from lorakit.models.packed import packed_layers
from lorakit.models.parameter_swaps import MARK
from lorakit.models.quantised import QuantisedWeight, unmarked
from lorakit.models.tree import is_of_adapter, parents, submodule, without_wrappers

_LOG = logging.getLogger(__name__)

_IS_MERGED: ContextVar[bool] = ContextVar("is_merged", default=False)
"""Whether the running `save_pretrained` of another library has read merged weights."""


def save_pretrained(
    model: nn.Module,
    own: OwnMethod,
    save_directory: str | Path,
    *args: Any,
    state_dict: dict[str, Tensor] | None = None,
    **kwargs: Any,
) -> Any:
    """Write a model of which any part has adapters by its own `save_pretrained`, also that of another library.

    Weights that bitsandbytes quantised are written dequantised, because merged weights are not quantised. Those of
    other libraries are left out.

    Raises:
        AdapterStateError: Called inside `per_sample`, where rows have different weights, or on a model that is sharded
            over processes. Or the folder would not load, because an active adapter cannot be merged or weights are
            left out, and `push_to_hub` is set or the class is not one of transformers.
        AdapterFileError: An active adapter or a merged weight holds NaN or infinity.
    """
    if not isinstance(model, PreTrainedModel):
        with _state_dict_is_merged(model):
            return own(save_directory, *args, **kwargs)
    _IS_MERGED.set(True)
    require_unsharded(model)
    missing = _what_is_missing(model)
    if kwargs.get("push_to_hub"):
        _refuse_push(missing)
    state = adapted_state_dict(model, model.state_dict() if state_dict is None else state_dict)
    config: Any = getattr(model, "config", None)
    tied = getattr(config, "tie_word_embeddings", None)
    if tied and unties(model, state):
        config.tie_word_embeddings = False
    separate_names(tied_names(model), state)
    # Undoing the renames of an architecture's old checkpoints would rename the adapters' keys as well.
    kwargs.setdefault("save_original_format", False)
    try:
        with unmarked(model), _configuration_prevents_loading(config, missing):
            return own(save_directory, *args, state_dict=state, **kwargs)
    finally:
        if tied is not None:
            config.tie_word_embeddings = tied
        is_main_process = args[0] if args else kwargs.get("is_main_process", True)
        if missing and is_main_process:
            _prevent_loading(Path(save_directory), missing)


@contextlib.contextmanager
def _state_dict_is_merged(model: nn.Module) -> Iterator[None]:
    """Let `model.state_dict()` return merged weights, for a `save_pretrained` that takes no state dict.

    Raises:
        AdapterStateError: An adapter or a tie would be lost; or the block has not called `model.state_dict()`, nor the
            `save_pretrained` of a part.
    """

    def merge(module: nn.Module, state: dict[str, Tensor], prefix: str, *unused: Any) -> None:
        require_unsharded(model)
        if missing := _what_is_missing(model):
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
        _IS_MERGED.set(True)
        state.clear()
        state.update(merged)

    hook, before = model.register_state_dict_post_hook(merge), _IS_MERGED.set(False)
    try:
        yield
        if not _IS_MERGED.get():
            raise AdapterStateError(
                f"save_pretrained() of {type(model).__name__} does not write model.state_dict(), so the folder lacks "
                "the adapter. Delete it, and call merge(keep_base=False) before save_pretrained()."
            )
    finally:
        _IS_MERGED.reset(before)
        hook.remove()


def push_to_hub(model: nn.Module, own: OwnMethod, *args: Any, **kwargs: Any) -> Any:
    """Upload a model of which any part has adapters by its own `push_to_hub`, which calls `save_pretrained`.

    Raises:
        AdapterStateError: As for `save_pretrained` with `push_to_hub`.
    """
    _refuse_push(_what_is_missing(model))
    return own(*args, **kwargs)


def _refuse_push(missing: str | None) -> None:
    if missing:
        raise AdapterStateError(
            f"The pushed folder would not load: {missing}. Push the folder that adapters.save() writes."
        )


def _what_is_missing(model: nn.Module) -> str | None:
    """Return what a folder of `save_pretrained` lacks, so that it must not load; None if it lacks nothing."""
    if (packed := packed_part(model)) is not None:
        return f"{packed} is quantised, and its numbers are not written"
    unmerged, _ = next(unmergeable(model), (None, ""))
    return None if unmerged is None else f"the adapter '{unmerged}' is no part of the weights"


def _without_weights(record: dict[str, Any], missing: str) -> dict[str, Any]:
    """Return a model's configuration that makes `from_pretrained` fail, with the reason."""
    reason = f"none: {missing}. Load the folder of adapters.save()"
    return {**record, "transformers_weights": reason}


@contextlib.contextmanager
def _configuration_prevents_loading(config: Any, missing: str | None) -> Iterator[None]:
    """Make `save_pretrained` write a configuration on which `from_pretrained` fails.

    transformers writes it before the weights. So the folder does not load while it has the weights of an earlier save,
    or if the process is killed before the end.
    """
    if config is None or missing is None:
        yield
        return

    def to_json_file(path: str | Path, use_diff: bool = True) -> None:
        del config.__dict__["to_json_file"]  # it would be written too
        record = json.loads(config.to_json_string(use_diff=use_diff))
        config.__dict__["to_json_file"] = to_json_file
        storage.write_json(path, _without_weights(record, missing))

    config.__dict__["to_json_file"] = to_json_file
    try:
        yield
    finally:
        config.__dict__.pop("to_json_file", None)


def _prevent_loading(folder: Path, missing: str) -> None:
    """Make `from_pretrained` fail on a folder that lacks a part of the model, and warn."""
    path = folder / CONFIG_NAME
    if path.exists():
        # A class with a `save_pretrained` of its own may have written it in another way.
        storage.write_json(path, _without_weights(storage.read_json(path), missing))
    _LOG.warning(
        "%s: training can resume from '%s', but from_pretrained rejects it. To get a folder that loads, call "
        "adapters.save().",
        missing,
        folder,
    )


@torch.no_grad()
def adapted_state_dict(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `state` with the active adapters merged into the base keys, and a mark for every changed layer.

    Its keys are those of the model without wrappers (`torch.compile` of a block), so that every model loads it. Weights
    that another library than bitsandbytes has quantised are left out: nothing merges into them.
    """
    packed = {path for path, *_ in packed_layers(model)}
    result = {
        name: tensor
        for key, tensor in state.items()
        if not _is_packed(name := without_wrappers(key), tensor, packed)
    }
    marks: dict[str, tuple[str, Tensor]] = {}  # by the key of a changed weight
    for path in packed:  # some libraries have a `state_dict` without the layer's children
        adapters = submodule(model, path)._modules.get(ADAPTERS)
        if adapters is not None:
            result = adapters.state_dict(prefix=f"{path}.{ADAPTERS}.") | result
    replaced = set()  # keys whose weight is a merged or trained one, which is never quantised
    for path, layer, adapters in adapted_layers(model):
        if adapters.activation.users_block is not None:
            raise AdapterStateError(
                "The model cannot be saved inside per_sample, per_token, using or disabled: rows may have other "
                "weights. Leave the block first."
            )
        blend = adapters.activation.active.blends[0]
        prefix = f"{path}." if path else ""
        has_changed = False
        changed = changed_weights(path, layer, adapters, blend, packed=True)
        # On a GPU, all merged weights together may not fit beside the base.
        merged_layer = MergedLayer(path, layer, adapters, changed)
        for attribute, (W, _, merged) in merged_layer.tensors(blend).items():
            result[prefix + attribute] = merged.cpu()
            # PiSSA's initial factors cancel up to rounding.
            has_changed |= not merged.allclose(W.to(merged.dtype))
            replaced.add(prefix + attribute)
        if changed:
            mark = torch.tensor([CHANGED if has_changed else 1], dtype=torch.uint8)
            marks[prefix + changed[0]] = f"{prefix}{ADAPTERS}.{MARK}", mark
        replaced.update(prefix + attribute for attribute in adapters.replaced)
    _expand_quantised(model, result, replaced)
    # A copy of a base tensor may have several keys (the base's own, and every tied one): write it once.
    copies = _copies(model)
    seen = {id(p) for name, p in model.named_parameters() if without_wrappers(name) not in copies}
    for key, parameter in copies.items():
        if id(parameter) in seen:
            result.pop(key, None)
        seen.add(id(parameter))
    # A file may be split into shards, which are loaded one by one: a mark stays with its weight.
    items = (
        [(key, tensor), marks[key]] if key in marks else [(key, tensor)]
        for key, tensor in result.items()
    )
    return dict(itertools.chain.from_iterable(items))


def _is_packed(key: str, tensor: Any, packed: set[str]) -> bool:
    """Whether an entry of a state dict holds packed numbers, or belongs to them in a layer at one of the paths."""
    if is_of_adapter(key):
        return False
    return (isinstance(tensor, Tensor) and packs_numbers(tensor)) or any(
        path in packed and key != f"{path}.bias" for path in parents(key)
    )


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


def _copies(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained copies of base tensors by their keys in the model; one of a tied tensor under every key."""
    copies = {}
    for path, _, adapters in adapted_layers(model):
        for name, module in adapters.items():
            for attribute, copy in module.trained.items():
                key = f"{ADAPTERS}.{name}.trained.{attribute}"
                copies[f"{path}.{key}" if path else key] = copy
    return copies
