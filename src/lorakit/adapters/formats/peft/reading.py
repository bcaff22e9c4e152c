"""Read PEFT folders: each option must be known, and each tensor must be a factor or a weight of the base."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lorakit import storage
from lorakit.adapters.formats.peft import experts
from lorakit.adapters.formats.peft.adapter_config import PeftConfig, parse
from lorakit.adapters.formats.peft.attention import as_computed
from lorakit.adapters.formats.peft.writing import B_BIAS, MAGNITUDE, PREFIX, is_trained_bias
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.adapters.formats.stored_layer import StoredLayer, located, rank_notices
from lorakit.adapters.formats.tensors import read_tensors
from lorakit.errors import AdapterFileError, ConfigurationError
from lorakit.file_names import PEFT_CONFIG, PEFT_PICKLE, PEFT_TENSORS
from lorakit.methods.lora import LoRA
from lorakit.methods.lora.forms import (
    AttentionForm,
    ConvForm,
    EmbeddingForm,
    ExpertsForm,
    LinearForm,
)
from lorakit.models.patterns import endings
from lorakit.models.tree import parents, without_wrappers

_PART = re.compile(
    r"(?P<path>.+)\.(?P<part>lora_[AB]\.weight|lora_B\.bias|lora_embedding_[AB]|lora_magnitude_vector)(\.weight)?"
)
_ADAPTER_NAME = re.compile(r"(?<=\.)(lora_\w+)\.default((\.weight|\.bias)?)$")
"""The default name of an adapter in a key of a live PEFT model; PEFT's own files leave it out."""
_LIVE_COPY = re.compile(r"\.modules_to_save(\.default)?(?=\.)")
"""What a live PEFT model has in the name of a module that it trains in full."""
_OUT_PROJ = ".base_layer.out_proj"
"""End of PEFT's path of an `nn.MultiheadAttention`'s output projection, after the path of the module."""

_Parts = Mapping[str, Tensor]
"""The tensors of one layer, by their names in PEFT without the suffix ``.weight``."""


def read_peft(folder: str | Path) -> StoredAdapter:
    """Read a PEFT LoRA folder.

    Every pair of factors must be complete and match the options. Only a live model can show whether the layers exist,
    and which of the other weights were trained (`check_targets`).

    Raises:
        AdapterFileError: The folder is damaged, incomplete or unsafe, or sets an option that lorakit
            does not implement.
    """
    folder = Path(folder)
    config_path = folder / PEFT_CONFIG
    options = storage.read_json(config_path)
    with located(f"'{config_path}'"):
        config = parse(options)
    tensors_path = _tensors_path(folder)
    with located(f"'{tensors_path}'"):
        return _adapter(options, config, _plain_names(read_tensors(tensors_path)))


def _tensors_path(folder: Path) -> Path:
    for name in (PEFT_TENSORS, PEFT_PICKLE):
        if os.path.lexists(folder / name):
            return folder / name
    raise AdapterFileError(
        f"'{folder}' has a {PEFT_CONFIG}, but neither {PEFT_TENSORS} nor {PEFT_PICKLE}: the download "
        "or save is incomplete. Download or save it again."
    )


def _plain_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without PEFT's prefix, which transformers may omit, the adapter's name, and wrappers."""
    named: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = _ADAPTER_NAME.sub(r"\1\2", without_wrappers(key).removeprefix(PREFIX))
        if name in named:
            raise AdapterFileError(
                f"it holds '{name}' twice, with and without the prefix '{PREFIX}', the adapter's name or a wrapper's."
            )
        named[name] = tensor
    return named


def _adapter(
    options: dict[str, Any], config: PeftConfig, tensors: Mapping[str, Tensor]
) -> StoredAdapter:
    parts: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        match = _PART.fullmatch(key)
        if match is not None:
            parts.setdefault(match["path"], {})[match["part"].removesuffix(".weight")] = tensor
        elif "lora_" in key:
            raise AdapterFileError(
                f"'{key}' is no name of PEFT. Keys of factors end in lora_A.weight or lora_B.weight, without an "
                "adapter name other than default. Download or save the adapter again."
            )
        else:
            others[key] = tensor
    layers = _layers(parts, config)
    notices = as_computed(layers, options.get("peft_version"))
    method = _method(config, layers)
    trained, copies = _sort(others, layers, method)
    found = {path for name in trained for path in parents(name)}
    saved = [entry for entry in config.modules_to_save if any(p.endswith(entry) for p in found)]
    if config.modules_to_save and not saved:
        raise AdapterFileError(
            f"modules_to_save names {', '.join(config.modules_to_save)}, but the file has no tensors for "
            "them: the trained head is missing."
        )
    return StoredAdapter(
        method=replace(method, train_modules=tuple(saved)),
        layers=layers,
        trained=trained,
        base_copies=copies,
        provenance={"peft": _provenance(options)},
        notices=[*notices, *rank_notices(layers)],
        peft_config=options,
    )


def option_notices(recorded: Mapping[str, Any]) -> list[str]:
    """Return what the user should know about the options in the record of a PEFT folder."""
    if not recorded.get("loftq_config"):
        return []
    return [
        "LoftQ initialised this adapter (loftq_config is set), so it belongs to the base that LoftQ quantised. Make "
        "sure that this model has those weights, not the original ones."
    ]


def _layers(parts: Mapping[str, _Parts], config: PeftConfig) -> dict[str, StoredLayer]:
    """Return the layers by path, with the rank and alpha that PEFT looks up for each."""
    layers: dict[str, StoredLayer] = {}
    stacked = experts.paths(parts.keys(), config.target_parameters)
    for key, tensors in parts.items():
        kind = LinearForm.kind
        if "lora_embedding_A" in tensors:
            kind = EmbeddingForm.kind
        elif key in stacked:
            kind = ExpertsForm.kind
        elif key + _OUT_PROJ in parts:
            kind = AttentionForm.kind
        # PEFT looks up the options of an out_proj under the attention module's path, of any other layer under its own.
        options_path = stacked.get(key, key.removesuffix(_OUT_PROJ))
        is_out_proj = key.endswith(_OUT_PROJ)
        if is_out_proj and options_path not in parts:
            raise AdapterFileError(
                f"'{key}' has factors, but its parent '{options_path}' has none."
            )
        path = f"{options_path}.out_proj" if is_out_proj else options_path
        if path in layers:
            raise AdapterFileError(f"'{path}' has factors under two names.")
        with located(f"'{path}'"):
            layers[path] = _layer(kind, options_path, tensors, config)
    return layers


def _layer(kind: str, options_path: str, parts: _Parts, config: PeftConfig) -> StoredLayer:
    embedding = kind == EmbeddingForm.kind
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    options = ((MAGNITUDE, config.use_dora), (B_BIAS, config.lora_bias))
    expected = {*names, *(name for name, is_set in options if is_set)}
    if parts.keys() != expected:
        raise AdapterFileError(
            f"it has {', '.join(sorted(parts))}; with use_dora {str(config.use_dora).lower()} and lora_bias "
            f"{str(config.lora_bias).lower()}, {', '.join(sorted(expected))} were expected. Download or save the "
            "adapter again."
        )
    A, B = (parts[name] for name in names)
    rank = config.rank_of(options_path)
    experts_count = A.shape[0] // rank if kind == ExpertsForm.kind and A.ndim == B.ndim == 2 else 1
    if A.numel() and A.shape[:1] != (experts_count * rank,):  # `StoredLayer` rejects an empty one
        raise AdapterFileError(
            f"{names[0]} has shape {tuple(A.shape)}, but {PEFT_CONFIG} gives it rank {rank}."
        )
    if kind == ExpertsForm.kind and B.numel():
        if B.shape[1:] != (A.shape[0],):
            raise AdapterFileError(
                f"lora_A has shape {tuple(A.shape)} and lora_B {tuple(B.shape)}; (experts * {rank}, in) and "
                f"(out, {rank} * experts) were expected."
            )
        B = experts.from_file(B, experts_count)
    magnitude = parts.get(MAGNITUDE)
    layer = StoredLayer(
        kind=ConvForm.kind if A.ndim > 2 and kind == LinearForm.kind else kind,
        A=A,
        B=B,
        B_bias=parts.get(B_BIAS),
        scaling=config.scaling_of(options_path),
        alpha=config.alpha_of(options_path),
        magnitude=None if magnitude is None else magnitude.flatten(),
        transposed=config.fan_in_fan_out and kind == LinearForm.kind and A.ndim == 2,
    )
    if layer.kind == ConvForm.kind and layer.groups > 1:
        layer.grouped = False  # PEFT's A of a grouped convolution reads all input channels
        if magnitude is not None:
            raise AdapterFileError(
                "it has DoRA (use_dora) on a grouped convolution, for which PEFT computes the norms of weights that "
                "the layer does not use. Load it with PEFT."
            )
    return layer


def _sort(
    tensors: Mapping[str, Tensor], layers: Collection[str], method: LoRA
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tensors other than factors by their names in the base: those that the options train, and others."""
    trained: dict[str, Tensor] = {}
    copies: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        # PEFT moves a layer's own parameters to its child `base_layer`. With bias "all" it saves the biases of modules
        # trained in full under several names.
        if (plain := key.replace(".original_module.", ".")) != key and plain in tensors:
            continue
        name = _LIVE_COPY.sub("", key).replace(".base_layer.", ".")
        # PEFT's rule, which does not require a dot before an entry of modules_to_save.
        in_module = any(path.endswith(tuple(method.train_modules)) for path in parents(name))
        into = trained if in_module or is_trained_bias(name, method, layers) else copies
        if not into.setdefault(name, tensor).equal(tensor):
            raise AdapterFileError(
                f"it holds '{name}' twice, with different numbers. Download or save the adapter again."
            )
    return trained, copies


def _method(config: PeftConfig, layers: Mapping[str, StoredLayer]) -> LoRA:
    """Return lorakit's settings with the same meaning as PEFT's options."""
    listed = config.target_modules if isinstance(config.target_modules, tuple) else ()
    # PEFT allows names that the model lacks, in options for several models; a new adapter of lorakit does not.
    names = {*listed, *config.target_parameters}
    used = sorted({ending for path in layers for ending in endings(path)} & names)
    # An attention module's name covers its out_proj too.
    covered = all(
        not names.isdisjoint((*endings(path), *endings(path.removesuffix(".out_proj"))))
        for path in layers
    )
    try:
        return LoRA(
            rank=config.r,
            alpha=config.lora_alpha,
            targets=tuple(used) if covered else tuple(layers),
            dropout=config.lora_dropout,
            bias=config.bias,
            init="gaussian" if config.init_lora_weights == "gaussian" else "kaiming",
            scaling="rslora" if config.use_rslora else "standard",
            lora_bias=config.lora_bias,
            dora=config.use_dora,
            rank_pattern=config.used_entries("rank_pattern", layers),
            alpha_pattern=config.used_entries("alpha_pattern", layers),
            train_modules=config.modules_to_save,
        )
    except ConfigurationError as error:
        raise AdapterFileError(f"{PEFT_CONFIG}: {error}") from error


def _provenance(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that also matter for an adapter made from this one."""
    names = ("base_model_name_or_path", "revision", "task_type", "peft_version")
    recorded = {name: options[name] for name in names if isinstance(options.get(name), str)}
    return recorded | ({"loftq_config": loftq} if (loftq := options.get("loftq_config")) else {})
