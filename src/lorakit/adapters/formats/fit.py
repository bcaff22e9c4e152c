"""Validate an adapter that was read from a file against the live model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from lorakit.adapters.formats.layout import ParameterNames, beyond_peft, parameters_by_name
from lorakit.adapters.formats.loralib.reading import ASSUMED_KINDS
from lorakit.adapters.formats.peft import expected_layers
from lorakit.adapters.formats.peft.adapter_config import parse
from lorakit.adapters.formats.peft.trained import is_trained_bias, trained_parents
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.adapters.formats.stored_layer import StoredLayer
from lorakit.adapters.tensor_checks import equals_base
from lorakit.errors import AdapterFileError, nearest
from lorakit.file_names import PEFT_CONFIG
from lorakit.formatting import listed
from lorakit.methods.lora import LoRA
from lorakit.methods.lora.forms import EmbeddingForm, LinearForm
from lorakit.models.heads import input_embeddings, output_embeddings
from lorakit.models.layers import StackedWeight
from lorakit.models.tree import base_modules, is_inside, layers_by_path


def check_targets(stored: StoredAdapter, path: str | Path, model: nn.Module) -> None:
    """Validate an adapter that was read from a file against the live model, and complete it.

    Without a record of the base: layers with names of transformers 4 get today's. PEFT: every layer that the options
    select must have tensors, and every layer with tensors must be selected. PEFT, and adapters made from its folders:
    layers on which PEFT computes something else are rejected, or get a notice. loralib: factors get the kind of the
    model's layer. Both: copies of base weights that equal the model's are dropped; others count as trained. Every
    format: a trained parameter that the model ties is listed under each name that the method trains.

    Args:
        stored: The adapter from the file; changed in place.
        path: Path of the file, for messages.
        model: The base model.

    Raises:
        AdapterFileError: The file's options and tensors disagree, or its base weights do not fit.
    """
    modules = layers_by_path(model)
    if stored.base is None:
        _rename_layers(stored, path, model, modules)
    if stored.from_peft is not None:
        _require_experts(stored, path, modules)
        _require_arithmetic(stored, path, model)
        if not stored.from_peft.get("peft_version"):  # PEFT records it since 0.18
            stored.notices += _scale_notices(stored.layers, modules)
    elif stored.base is None:  # a loralib file records no base
        stored.layers = {p: _of_kind(layer, modules.get(p)) for p, layer in stored.layers.items()}
        stored.notices = [notice for notice in stored.notices if notice != ASSUMED_KINDS]
    if stored.peft_config is not None:
        expected = expected_layers(stored.peft_config, model)
        if expected is not None and expected != stored.layers.keys():
            without = [*map(repr, sorted(expected - stored.layers.keys()))]
            extra = [*map(repr, sorted(stored.layers.keys() - expected))]
            parts = [f"no tensors for {listed(without, 1)}, which they select"] if without else []
            parts += [f"tensors for {listed(extra, 1)}, which they do not select"] if extra else []
            raise AdapterFileError(
                f"'{path}': the options in {PEFT_CONFIG} and the tensors disagree on this model. The "
                f"file has {' and '.join(parts)}. Load it on the model class it was trained with."
            )
    if stored.base_copies or stored.trained:
        names = parameters_by_name(model)
        if stored.base_copies:
            _sort_base_copies(stored, path, names, _embedding_names(model, names))
        _list_tied(stored, path, model, names.aliases)
        if stored.peft_config is not None:
            _require_saved_modules(stored, path, model, names)


def _require_experts(
    stored: StoredAdapter, path: str | Path, modules: Mapping[str, nn.Module]
) -> None:
    """Reject factors of a parameter that is no stacked weight of experts, which PEFT's target_parameters may name."""
    for name, layer in stored.layers.items():
        if layer.is_stacked and not isinstance(modules.get(name), StackedWeight):
            raise AdapterFileError(
                f"'{path}' adapts the parameter '{name}' (target_parameters), and lorakit adapts only the stacked "
                "weights of experts in this way. Load it with PEFT, or merge it there and use the merged model."
            )


def _require_arithmetic(stored: StoredAdapter, path: str | Path, model: nn.Module) -> None:
    """Reject layers on which lorakit computes something else than the PEFT that trained the adapter."""
    beyond = beyond_peft(model)
    for layer_path in stored.layers:
        if layer_path in beyond:
            raise AdapterFileError(
                f"'{path}' adapts '{layer_path}', but {beyond[layer_path]}: lorakit would compute something else "
                "than the adapter was trained with. Load it with PEFT."
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
        "scale of an embedding (some models, such as Gemma 1 and 2, scaled outside of it then). lorakit does: "
        f"{found}. If such a version trained the adapter, it acts that many times stronger there than in training. "
        "Then divide alpha of the layer by this number (alpha_pattern in adapter_config.json), or activate it with "
        "weight 1 / this number if it adapts nothing else. To end this warning, set peft_version to "
        '"0.18.0" in the file that PEFT wrote.'
    ]


def _rename_layers(
    stored: StoredAdapter, path: str | Path, model: nn.Module, modules: Collection[str]
) -> None:
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
            raise AdapterFileError(f"'{path}': '{name}' has factors under two names.")
        layers[name] = layer
    stored.layers = layers


def _require_saved_modules(
    stored: StoredAdapter, path: str | Path, model: nn.Module, names: ParameterNames
) -> None:
    """Reject a file without tensors for a module that modules_to_save selects on this model, by PEFT's rule."""
    entries = parse(stored.peft_config or {}).modules_to_save
    if not entries:
        return
    trained = {tied for name in stored.trained for tied in names.names_of(name)}
    for name, module in base_modules(model):
        is_selected = name.endswith(entries) and any(True for _ in module.parameters())
        if is_selected and not any(is_inside(parameter, name) for parameter in trained):
            raise AdapterFileError(
                f"'{path}' has no tensors for '{name}', which modules_to_save in {PEFT_CONFIG} selects. Save or "
                "download the adapter again."
            )


def _of_kind(layer: StoredLayer, live: nn.Module | None) -> StoredLayer:
    """Return the layer with the kind of the live one, which a loralib file without weights does not show."""
    if live is None or layer.kind not in (LinearForm.kind, EmbeddingForm.kind):
        return layer
    if isinstance(live, nn.Embedding):
        return replace(layer, kind=EmbeddingForm.kind, transposed=False)
    layer = replace(layer, kind=LinearForm.kind)
    if isinstance(live, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return layer.as_loralib_conv(live.weight.shape)
    return layer


def _embedding_names(model: nn.Module, names: ParameterNames) -> set[str]:
    """Return all names of the parameters of the input and the output embedding."""
    embeddings = (input_embeddings(model), output_embeddings(model))
    return {
        name
        for path, module in base_modules(model)
        if any(module is embedding for embedding in embeddings)
        for attribute in module._parameters
        for name in names.names_of(f"{path}.{attribute}")
    }


def _sort_base_copies(
    stored: StoredAdapter, path: str | Path, names: ParameterNames, embeddings: set[str]
) -> None:
    """Empty `base_copies`: drop those that equal the model's, move the others to `trained`."""
    live, is_peft = names.parameters, stored.peft_config is not None
    unknown, changed = [], []
    for name, tensor in stored.base_copies.items():
        if name not in live:
            unknown.append(name)
            continue
        base = live[name]
        if equals_base(tensor, base):
            continue
        is_explained = name in embeddings or name.rpartition(".")[0] in stored.layers
        if is_peft and not is_explained:
            raise AdapterFileError(
                f"'{path}' has a '{name}' that differs from the model's, and its options do not train it. Only "
                "weights of embeddings and of adapted layers may differ. Load it on the base it was trained on."
            )
        if base.shape != tensor.shape:
            raise AdapterFileError(
                f"'{path}' has '{name}' with shape {tuple(tensor.shape)}, but the model's has shape "
                f"{tuple(base.shape)}. If the vocabulary grew, resize the model first: "
                f"model.resize_token_embeddings({tensor.shape[0]})."
            )
        if name.removesuffix(".weight") in stored.layers and not is_peft:
            raise AdapterFileError(
                f"'{path}' has a '{name}' that differs from the model's: the file was saved with its "
                "adapter merged into the weights (in eval mode), or belongs to another base."
            )
        changed.append(name)
    if unknown and is_peft:
        raise AdapterFileError(
            f"'{path}' has '{unknown[0]}', but the model does not.{nearest(unknown[0], live)} "
            "Load it on the model class it was trained with."
        )
    _train_copies(stored, changed, names)
    stored.base_copies.clear()
    if changed:
        stored.notices.append(
            f"The file has {len(changed)} base weights that differ from the model's, the first "
            f"'{changed[0]}'; they count as trained."
        )
    if unknown:
        stored.notices.append(
            f"The file has {len(unknown)} entries that the model does not have, the first "
            f"'{unknown[0]}'; they are ignored.{nearest(unknown[0], live)}"
        )


def _train_copies(stored: StoredAdapter, changed: Iterable[str], names: ParameterNames) -> None:
    """Move base copies to `trained`, under each name of a tied weight: PEFT loads them into the base.

    `save` stores a tied weight once, under the first name in `trained`. `load` restores the other names from the
    modules that the method trains.
    """
    tied = {name: names.names_of(name) for name in changed}
    copies = stored.base_copies
    stored.trained = {
        alias: copies.get(alias, copies[name])
        for name, aliases in tied.items()
        for alias in aliases
    } | stored.trained
    if isinstance(stored.method, LoRA):
        others = (alias.rpartition(".")[0] for aliases in tied.values() for alias in aliases[1:])
        modules = dict.fromkeys((*stored.method.train_modules, *others))
        stored.method = replace(stored.method, train_modules=tuple(modules))


def _list_tied(
    stored: StoredAdapter,
    path: str | Path,
    model: nn.Module,
    aliases: Mapping[str, tuple[str, ...]],
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
                    f"'{path}' trains '{in_file[0]}' and '{name}' apart, but they are one tensor in this "
                    "model. Save a copy of the base with tie_word_embeddings=False and a tensor for each name, "
                    "and load the adapter on that copy: --base.name COPY."
                )
        stored.trained.update({name: tensor for name in names if _trains(stored, name, model)})


def _trains(stored: StoredAdapter, name: str, model: nn.Module) -> bool:
    """Whether the method trains a base parameter under this name."""
    if isinstance(stored.method, LoRA):
        return bool(trained_parents(name, stored)) or is_trained_bias(name, stored, stored.layers)
    return name in stored.method.trained_parameters(model)
