"""lorakit.json: facts that PEFT's files cannot hold, and a checksum of every file in the folder.

In a folder that PEFT can load, the tensors are in PEFT's form (`peft.factors`), and lorakit.json
describes the original form of each layer. If PEFT's format cannot represent the adapter, its tensors
are in `lorakit_model.safetensors` unchanged, and the folder has no adapter_config.json.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from lorakit import storage
from lorakit.adapters.formats import peft
from lorakit.adapters.formats.fingerprint import BaseRecord
from lorakit.adapters.formats.peft.experts import from_file
from lorakit.adapters.formats.peft.factors import from_peft, peft_rank
from lorakit.adapters.formats.peft.writing import factor_keys, layer_keys
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.adapters.formats.stored_layer import TENSORS, StoredLayer, located, rank_notices
from lorakit.errors import AdapterFileError, ConfigurationError, LorakitError, is_momentary
from lorakit.file_names import (
    LORAKIT_JSON,
    LORAKIT_TENSORS,
    MODEL_CARD,
    PEFT_CONFIG,
    PEFT_TENSORS,
    TOKENIZER_CONFIG,
)
from lorakit.methods import METHODS, Combined, Method
from lorakit.methods.lora.forms import EmbeddingForm, ExpertsForm, LinearForm
from lorakit.methods.registry import recorded_method
from lorakit.models.layers import RowSlice
from lorakit.storage.tensors import read_safetensors
from lorakit.version import __version__

FORMAT_VERSION = 1

_FIELDS = ("kind", "alpha", "scaling", "grouped", "transposed", "tied_head")
"""Fields of a `StoredLayer` that lorakit.json holds unchanged."""

_LAYER_KEYS = {*_FIELDS, "rank", "A", "B", "slices", "pissa", "dora", "weight_shape"}
_RECORD_KEYS = {
    *("format", "format_version", "lorakit_version", "method", "tensors", "layers", "modules"),
    *("trained", "repeated", "base", "provenance", "files", storage.CHECKSUM),
}


def tensors_of(stored: StoredAdapter) -> dict[str, Tensor]:
    """Return an adapter's tensors unchanged, by their keys in the file of a folder that PEFT cannot load."""
    tensors = {
        f"layers.{path}.{name}": tensor
        for path, layer in stored.layers.items()
        for name, tensor in layer.tensors.items()
    }
    tensors.update({f"modules.{name}": tensor for name, tensor in stored.module_tensors.items()})
    tensors.update({f"trained.{name}": tensor for name, tensor in stored.trained.items()})
    return tensors


def write(stored: StoredAdapter, folder: Path, form: peft.PeftForm | None) -> None:
    """Write lorakit.json. Call it last, since it records the checksums of the other files.

    `form` is the adapter in PEFT's format, or None if the tensors are in `lorakit_model.safetensors`.

    Raises:
        ConfigurationError: The provenance holds a value that JSON cannot represent.
    """
    key_starts = {} if form is None else form.layer_keys
    trained_keys = {} if form is None else form.trained_keys
    record: dict[str, Any] = {
        "format": "lorakit",
        "format_version": FORMAT_VERSION,
        "lorakit_version": __version__,
        "method": _method_record(stored.method),
        "tensors": LORAKIT_TENSORS if form is None else PEFT_TENSORS,
        "layers": {
            path: _describe(layer, key_starts.get(path)) for path, layer in stored.layers.items()
        },
        "modules": {path: list(tensors) for path, tensors in stored.modules.items()},
        "trained": {name: trained_keys.get(name) for name in stored.trained},
        "repeated": [] if form is None else _repeated(form, stored),
        "base": None if stored.base is None else stored.base.to_json(),
        "provenance": stored.provenance,
        "files": {
            path.relative_to(folder).as_posix(): storage.sha256(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path != folder / LORAKIT_JSON
        },
    }
    try:
        if (key := _other_key(stored.provenance)) is not None:  # JSON would convert it to a string
            raise TypeError(f"the key {key!r} is not a string")
        storage.write_record(folder / LORAKIT_JSON, record)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"The provenance cannot be written as JSON: {error}. Use texts, finite numbers, true, false, "
            "None, lists and dictionaries with texts as keys."
        ) from error


def _other_key(value: Any) -> Any:
    """Return a key of a dictionary inside `value` that is not a string; None without one."""
    if isinstance(value, dict):
        other = next((key for key in value if not isinstance(key, str)), None)
        return other if other is not None else _other_key(list(value.values()))
    if isinstance(value, list | tuple):
        return next((key for one in value if (key := _other_key(one)) is not None), None)
    return None


def read(folder: Path) -> StoredAdapter:
    """Read a folder with a lorakit.json.

    Raises:
        AdapterFileError: A file is missing or changed, or the tensors do not match lorakit.json.
    """
    path = folder / LORAKIT_JSON
    record = storage.read_json(path)
    _check_record(record, path)
    _check_keys(record, path)
    notices = _check_files(record, folder)
    tensors_name = record.get("tensors")
    if tensors_name not in (LORAKIT_TENSORS, PEFT_TENSORS) or tensors_name not in record["files"]:
        raise AdapterFileError(
            f"'{path}' names {tensors_name!r} as its tensor file; {LORAKIT_TENSORS} or {PEFT_TENSORS} was expected. "
            "Download or save the adapter again."
        )
    tensors = read_safetensors(folder / tensors_name)
    try:
        modules = {
            path: {name: _pop(tensors, f"modules.{path}.{name}") for name in names}
            for path, names in record.get("modules", {}).items()
        }
        in_peft_form = tensors_name == PEFT_TENSORS
        layers, trained = {}, {}
        for layer_path, description in record["layers"].items():
            with located(f"'{layer_path}'"):
                if in_peft_form:
                    layers[layer_path] = _layer_from_peft(description, tensors)
                else:
                    layers[layer_path] = _unchanged_layer(layer_path, description, tensors)
        for name, key in record["trained"].items():
            with located(f"the trained '{name}'"):
                trained[name] = _pop(tensors, key if in_peft_form else f"trained.{name}")
        for key in record["repeated"]:
            tensors.pop(key, None)
        if tensors:
            raise AdapterFileError(
                f"the tensor file holds {len(tensors)} tensors that {LORAKIT_JSON} does not list, the first "
                f"'{min(tensors)}'."
            )
        return StoredAdapter(
            method=_method(record.get("method")),
            layers=layers,
            modules=modules,
            trained=trained,
            base=None if record.get("base") is None else BaseRecord.from_json(record["base"]),
            provenance=dict(record.get("provenance") or {}),
            notices=[*notices, *rank_notices(layers)],
        )
    except LorakitError as error:
        raise AdapterFileError(f"'{folder}': {error}") from error
    except Exception as error:  # untrusted: a value may have any type or size
        if is_momentary(error):
            raise
        raise AdapterFileError(
            f"'{path}' does not match '{folder / tensors_name}': {type(error).__name__}: {error}. Download or save the "
            "adapter again."
        ) from error


# --- writing -------------------------------------------------------------------------------------


def _method_record(method: Method) -> dict[str, Any]:
    """Return a method's settings; for a combination, with those of its parts."""
    settings = dataclasses.asdict(method)
    if isinstance(method, Combined):
        settings["methods"] = [_method_record(part) for part in method.methods]
    return {"name": type(method).__name__, **settings}


def _describe(layer: StoredLayer, key: str | None) -> dict[str, Any]:
    """Return a layer's fields other than tensors; `key` is the prefix of its keys in PEFT's file, if it is in one."""
    description: dict[str, Any] = {
        **{name: getattr(layer, name) for name in _FIELDS},
        "A": list(layer.A.shape),
        "B": list(layer.B.shape),
        "slices": [dataclasses.asdict(s) for s in layer.slices],
        **_of_tensors(layer),
        "weight_shape": None if layer.weight_shape is None else list(layer.weight_shape),
    }
    return description if key is None else {**description, "key": key}


def _of_tensors(layer: StoredLayer) -> dict[str, Any]:
    """Return what a description says about the tensors that a layer has."""
    return {
        "rank": layer.rank,
        "pissa": layer.initial_A is not None,
        "lora_bias": layer.B_bias is not None,
        "dora": layer.magnitude is not None,
    }


def _repeated(form: peft.PeftForm, stored: StoredAdapter) -> list[str]:
    """Return the keys in PEFT's file that `read` ignores: copies of tied tensors, frozen weights, added zeros."""
    needed = set(form.trained_keys.values())
    for path, layer in stored.layers.items():
        needed.update(layer_keys(form.layer_keys[path], layer).values())
    return sorted(form.tensors.keys() - needed)


# --- reading -------------------------------------------------------------------------------------


def _check_record(record: Mapping[str, Any], path: Path) -> None:
    """Reject a file of another format, of a newer version, or with a wrong checksum of its own."""
    version = record.get("format_version")
    if record.get("format") != "lorakit" or type(version) is not int or version < 1:
        raise AdapterFileError(
            f"'{path}' does not describe a lorakit adapter: its format is {record.get('format')!r:.40} and its "
            f"format_version {version!r:.40}; 'lorakit' and a whole number were expected. Download or save the "
            "adapter again."
        )
    if version > FORMAT_VERSION:
        raise AdapterFileError(
            f"'{path}' has format version {version}, but this lorakit reads versions up to {FORMAT_VERSION}. "
            "Update lorakit."
        )
    storage.require_checksum(record, path, AdapterFileError)


def _check_keys(record: Mapping[str, Any], path: Path) -> None:
    """Reject unknown and missing keys: an unknown one may change what the adapter computes."""
    _require_keys(record, _RECORD_KEYS, set(), f"'{path}'")
    layers = record["layers"]
    for name, layer in layers.items() if isinstance(layers, Mapping) else ():
        _require_keys(layer, _LAYER_KEYS, {"key", "lora_bias"}, f"'{path}': the layer '{name}'")


def _require_keys(
    record: Mapping[str, Any], required: set[str], optional: set[str], what: str
) -> None:
    if not isinstance(record, Mapping):
        raise AdapterFileError(f"{what} is {record!r:.40}; names with values were expected.")
    if unknown := sorted(record.keys() - required - optional):
        raise AdapterFileError(
            f"{what} has keys that this lorakit does not know: {', '.join(unknown)}. Update lorakit."
        )
    if missing := sorted(required - record.keys()):
        raise AdapterFileError(
            f"{what} lacks the keys {', '.join(missing)}. Download or save the adapter again."
        )


def _check_files(record: Mapping[str, Any], folder: Path) -> list[str]:
    """Verify the checksum of every listed file, and return a notice of an edited card."""
    files = record.get("files")
    if not isinstance(files, Mapping):
        raise AdapterFileError(
            f"'{folder / LORAKIT_JSON}' has {files!r:.40} as 'files'; names with checksums were expected. Download or "
            "save the adapter again."
        )
    notices = []
    for name, digest in files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or any(char in name for char in "\\\0:"):
            raise AdapterFileError(
                f"'{folder / LORAKIT_JSON}' lists {name!r}, which can be outside its folder, so it was not opened."
            )
        if name in (MODEL_CARD, TOKENIZER_CONFIG) and not os.path.lexists(folder / name):
            continue  # a folder without the configuration has no tokenizer
        if storage.sha256(storage.regular_file(folder / name)) == digest:
            continue
        if name != MODEL_CARD:
            as_peft = (  # PEFT's save always changes its configuration
                f" If PEFT saved into this folder, or you edited the file, delete {LORAKIT_JSON}: the folder is then "
                "read as PEFT's, without the record of its base, task and templates."
            )
            raise AdapterFileError(
                f"'{folder / name}' has changed since the adapter was saved: it was damaged or edited. "
                f"Download or save the adapter again.{as_peft if name == PEFT_CONFIG else ''}"
            )
        notices.append(f"'{folder / name}' was edited after the adapter was saved.")
    return notices


def _method(record: Any) -> Method:
    """Build the method that `_method_record` described."""
    name = record.get("name") if isinstance(record, Mapping) else record
    method_class = recorded_method(name)
    if method_class is None or not isinstance(record, Mapping):
        raise AdapterFileError(
            f"its method is {name!r}, but this lorakit knows only {', '.join(METHODS)}. Update lorakit. For a method "
            "of your own, name its class: method path/to/file.py:Class (in Python, lorakit.use_method)."
        )
    settings = {
        key: tuple(v) if isinstance(v, list) else v for key, v in record.items() if key != "name"
    }
    if method_class is Combined:
        settings["methods"] = tuple(map(_method, record["methods"]))
    unknown = settings.keys() - {f.name for f in dataclasses.fields(method_class)}
    if unknown:
        raise AdapterFileError(
            f"its method has settings that this lorakit does not know: {sorted(unknown)}. Update lorakit."
        )
    return method_class(**settings)


def _pop(tensors: dict[str, Tensor], key: str) -> Tensor:
    """Remove and return a tensor; `read` rejects the tensors that remain at the end."""
    if key not in tensors:
        raise AdapterFileError(f"the tensor file has no '{key}'.")
    return tensors.pop(key)


def _unchanged_layer(
    path: str, description: Mapping[str, Any], tensors: dict[str, Tensor]
) -> StoredLayer:
    """Remove the tensors of a layer that `tensors_of` returned from `tensors`, and return the layer."""
    parts: dict[str, Any] = {name: _pop(tensors, f"layers.{path}.{name}") for name in ("A", "B")}
    for name, factor in parts.items():
        if list(factor.shape) != description[name]:
            raise AdapterFileError(
                f"{name} has shape {tuple(factor.shape)}, but {LORAKIT_JSON} describes {tuple(description[name])}."
            )
    for name in TENSORS:
        parts.setdefault(name, tensors.pop(f"layers.{path}.{name}", None))
    return _build(description, parts)


def _layer_from_peft(description: Mapping[str, Any], tensors: dict[str, Tensor]) -> StoredLayer:
    """Remove the tensors of a layer in PEFT's form from `tensors`, and return the original layer."""
    keys = factor_keys(
        description["key"],
        description["kind"],
        dora=description["dora"],
        lora_bias=description.get("lora_bias", False),
    )
    parts = {name: _pop(tensors, key) for name, key in keys.items()}
    A, B, magnitude, B_bias = parts["A"], parts["B"], parts.get("magnitude"), parts.get("B_bias")
    if description["kind"] == ExpertsForm.kind:
        B = from_file(B, description["A"][0] // description["rank"])
    if magnitude is not None:
        magnitude = magnitude.flatten()
    if _is_unchanged(description, A, B):
        return _build(description, {"A": A, "B": B, "B_bias": B_bias, "magnitude": magnitude})
    # An untrusted description could make `from_peft` allocate any amount: bound its shapes by the tensors in the file.
    for factor, name in ((A, "A"), (B, "B")):
        if torch.Size(description[name]).numel() > factor.numel():
            raise AdapterFileError(
                f"it cannot have a {name} of shape {description[name]}: its tensor has only "
                f"{factor.numel()} elements."
            )
    for piece in description["slices"]:
        if piece["groups"] * piece["stride"] != B.shape[0]:
            raise AdapterFileError(
                f"it cannot have the slice {piece}: its layer has {B.shape[0]} rows."
            )
    shapes = {name: torch.empty(description[name], device="meta") for name in ("A", "B")}
    if description["pissa"]:
        shapes |= {"initial_A": shapes["A"], "initial_B": shapes["B"]}
    for name in parts.keys() & {"magnitude", "B_bias"}:
        shapes[name] = torch.empty(shapes["B"].shape[0], device="meta")
    original = _build(description, shapes)
    # PEFT has one rank for both projections of an attention module; zeros pad the smaller one. Cut them off.
    rank = peft_rank(original)
    return from_peft(original, A[:rank], B[:, : rank // original.groups], magnitude, B_bias)


def _is_unchanged(description: Mapping[str, Any], A: Tensor, B: Tensor) -> bool:
    """Return whether PEFT's factors of a layer are those of lorakit: of a whole layer, other than a convolution."""
    return (
        description["kind"] in (LinearForm.kind, EmbeddingForm.kind, ExpertsForm.kind)
        and not description["slices"]
        and not description["pissa"]
        and (list(A.shape), list(B.shape)) == (description["A"], description["B"])
    )


def _build(description: Mapping[str, Any], tensors: Mapping[str, Any]) -> StoredLayer:
    """Return the layer that `_describe` described, with these tensors."""
    shape = description["weight_shape"]
    if not isinstance(description["slices"], list):
        raise AdapterFileError("its slices are not a list. Download or save the adapter again.")
    layer = StoredLayer(
        slices=tuple(RowSlice(**piece) for piece in description["slices"]),
        weight_shape=None if shape is None else tuple(shape),
        **{name: description[name] for name in _FIELDS},
        **tensors,
    )
    described = {"lora_bias": False, **description}
    for name, value in _of_tensors(layer).items():
        if described[name] != value:
            raise AdapterFileError(
                f"it has {name} {described[name]!r:.40}, but its tensors have {value!r}. Download or save the adapter "
                "again."
            )
    return layer
