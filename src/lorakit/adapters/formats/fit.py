"""Validate an adapter that was read from a file against the live model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from lorakit.adapters.formats.layout import ParameterNames, beyond_peft, parameters_by_name
from lorakit.adapters.formats.loralib import with_kinds
from lorakit.adapters.formats.peft.writing import is_trained_bias, trained_parents
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.adapters.formats.stored_layer import StoredLayer
from lorakit.adapters.tensor_checks import equals_base
from lorakit.errors import AdapterFileError, nearest
from lorakit.formatting import listed
from lorakit.methods.lora import LoRA
from lorakit.models.layers import StackedWeight
from lorakit.models.tree import layers_by_path


def check_targets(stored: StoredAdapter, model: nn.Module) -> None:
    """Validate an adapter that was read from a file against the live model, and complete it in place.

    Without a record of the base: layers with names of transformers 4 get today's. PEFT, and adapters made from its
    folders: layers on which PEFT computes something else are rejected, or get a notice; copies of base weights that
    equal the model's are dropped, others count as trained. loralib: factors get the kind of the model's layer. Every
    format: a trained parameter that the model ties is listed under each name that the method trains.

    Raises:
        AdapterFileError: Layers, factors or base weights of the file do not fit the model.
    """
    modules = layers_by_path(model)
    if stored.base is None:
        _rename_layers(stored, model, modules)
    if stored.from_peft is not None:
        _require_arithmetic(stored, model, modules)
        if not stored.from_peft.get("peft_version"):  # PEFT records it since 0.18
            stored.notices += _scale_notices(stored.layers, modules)
    elif stored.base is None:  # a loralib file records no base
        with_kinds(stored, modules)
    if stored.base_copies or stored.trained:
        names = parameters_by_name(model)
        _sort_base_copies(stored, names)
        _list_tied(stored, model, names.aliases)


def _rename_layers(stored: StoredAdapter, model: nn.Module, modules: Collection[str]) -> None:
    """Give layers that the model lacks their names of today, with the table of transformers, as PEFT does."""
    missing = [name for name in stored.layers if name not in modules]
    if not missing or not isinstance(model, PreTrainedModel):
        return
    table = [r for r in get_model_conversion_mapping(model) if isinstance(r, WeightRenaming)]
    layers: dict[str, StoredLayer] = {}
    for name, layer in stored.layers.items():
        if name in missing:
            name = rename_source_key(f"{name}.weight", table, [])[0].removesuffix(".weight")
        if name in layers:
            raise AdapterFileError(f"'{stored.path}': '{name}' has factors under two names.")
        layers[name] = layer
    stored.layers = layers


def _require_arithmetic(
    stored: StoredAdapter, model: nn.Module, modules: Mapping[str, nn.Module]
) -> None:
    """Reject layers on which lorakit computes something else than the PEFT that trained the adapter."""
    beyond = beyond_peft(model)
    for path, layer in stored.layers.items():
        reason = beyond.get(path)
        if layer.is_stacked and not isinstance(modules.get(path), StackedWeight):
            reason = "of the parameters (target_parameters) lorakit adapts only the stacked weights of experts"
        if reason is not None:
            raise AdapterFileError(
                f"'{stored.path}' adapts '{path}', but {reason}, so lorakit would compute something else than the "
                "adapter was trained with. Load it with PEFT, or merge it there and use the merged model."
            )


def _scale_notices(layers: Iterable[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """Return a notice if a layer is an embedding that multiplies its vectors by a number other than 1.

    PEFT multiplies the adapter's part too since 0.18 (https://github.com/huggingface/peft/pull/2825). Gemma 1 and 2
    multiplied outside of their embedding at the time of earlier versions.
    """
    scales = {}
    for path in layers:
        module = modules.get(path)
        # `embed_scale` may be a tensor without data, and is rounded to the model's dtype.
        scale = getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", 1.0))
        if scale != 1:
            scales[path] = float(scale)
    if not scales:
        return []
    found = listed([f"'{path}' by {scale:g}" for path, scale in scales.items()])
    return [
        "The file does not record its version of PEFT. PEFT before 0.18 did not multiply the adapter's part by the "
        f"scale of an embedding, and lorakit does: {found}. If such a version trained the adapter, divide alpha of the "
        "layer by this number (alpha_pattern in adapter_config.json). To end this warning, set peft_version to "
        '"0.18.0" in the file.'
    ]


def _sort_base_copies(stored: StoredAdapter, names: ParameterNames) -> None:
    """Empty `base_copies`: drop those that equal the model's, move the others to `trained`."""
    live, copies = names.parameters, stored.base_copies
    if unknown := [name for name in copies if name not in live]:
        raise AdapterFileError(
            f"'{stored.path}' has '{unknown[0]}', but the model does not.{nearest(unknown[0], live)} "
            "Load it on the model class it was trained with."
        )
    changed = [name for name, tensor in copies.items() if not equals_base(tensor, live[name])]
    stored.base_copies = {}
    if not changed:
        return
    # PEFT loads them into the base, under each name of a tied weight. `save` stores a tied weight once, under the first
    # name in `trained`; `load` restores the other names from the modules that the method trains.
    tied = {name: names.names_of(name) for name in changed}
    stored.trained = {
        alias: copies.get(alias, copies[name]) for name in changed for alias in tied[name]
    } | stored.trained
    if isinstance(stored.method, LoRA):
        owners = (alias.rpartition(".")[0] for aliases in tied.values() for alias in aliases[1:])
        modules = dict.fromkeys((*stored.method.train_modules, *owners))
        stored.method = replace(stored.method, train_modules=tuple(modules))
    stored.notices.append(
        f"The file has {len(changed)} base weights that differ from the model's, the first '{changed[0]}'; they count "
        "as trained."
    )


def _list_tied(
    stored: StoredAdapter, model: nn.Module, aliases: Mapping[str, tuple[str, ...]]
) -> None:
    """List a trained parameter that the model ties under every name that the method trains."""
    for first, others in aliases.items():
        names = (first, *others)
        in_file = [name for name in names if name in stored.trained]
        if not in_file:
            continue
        tensor = stored.trained[in_file[0]]
        for name in in_file[1:]:
            if not stored.trained[name].equal(tensor):
                raise AdapterFileError(
                    f"'{stored.path}' trains '{in_file[0]}' and '{name}' apart, but they are one tensor in this "
                    "model. Save a copy of the base with tie_word_embeddings=False and a tensor for each name, "
                    "and load the adapter on that copy: --base.name COPY."
                )
        stored.trained.update({name: tensor for name in names if _trains(stored, name, model)})


def _trains(stored: StoredAdapter, name: str, model: nn.Module) -> bool:
    """Whether the method trains a base parameter under this name."""
    method = stored.method
    if isinstance(method, LoRA):
        return bool(trained_parents(name, method)) or is_trained_bias(name, method, stored.layers)
    return name in method.trained_parameters(model)
