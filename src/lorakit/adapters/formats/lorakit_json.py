"""lorakit.json: facts that PEFT's files cannot hold, and a checksum of every file in the folder.

It describes each layer, and names the tensors of lorakit's own form that PEFT's file has too, with their keys there.
`lorakit_model.safetensors` has all others: those of adapters that PEFT's format cannot represent, and those whose form
is another in PEFT's file (slices, PiSSA, attention). If a listed file has changed since, reading fails; only the card
may be edited.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from lorakit import storage
from lorakit.adapters.formats import peft
from lorakit.adapters.formats.fingerprint import BaseRecord
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
from lorakit.methods.registry import recorded_method
from lorakit.models.layers import RowSlice
from lorakit.storage.tensors import read_safetensors, write_safetensors
from lorakit.version import __version__

FORMAT_VERSION = 2

_FIELDS = ("kind", "alpha", "scaling", "grouped", "transposed", "tied_head")
"""Fields of a `StoredLayer` that lorakit.json holds unchanged."""

_RECORD_KEYS = {
    *("format", "format_version", "lorakit_version", "method", "layers", "modules", "in_peft"),
    *("base", "provenance", "files", storage.CHECKSUM),
}


# --- writing -------------------------------------------------------------------------------------


def tensors_of(stored: StoredAdapter) -> dict[str, Tensor]:
    """Return an adapter's tensors in lorakit's own form, by name."""
    return {
        **{
            f"layers.{path}.{name}": tensor
            for path, layer in stored.layers.items()
            for name, tensor in layer.tensors.items()
        },
        **{f"modules.{name}": tensor for name, tensor in stored.module_tensors.items()},
        **{f"trained.{name}": tensor for name, tensor in stored.trained.items()},
    }


def beside(stored: StoredAdapter, form: peft.PeftForm | None) -> dict[str, Tensor]:
    """Return the tensors of `tensors_of` that PEFT's file does not have; `form` is its content, if there is one."""
    shared = _shared(stored, form)
    return {name: tensor for name, tensor in tensors_of(stored).items() if name not in shared}


def _shared(stored: StoredAdapter, form: peft.PeftForm | None) -> dict[str, str]:
    """Return the key in PEFT's file of each tensor that has the same form there, by its own name."""
    keys = {} if form is None else {id(tensor): key for key, tensor in form.tensors.items()}
    tensors = tensors_of(stored).items()
    return {name: keys[id(tensor)] for name, tensor in tensors if id(tensor) in keys}


def write(stored: StoredAdapter, folder: Path, form: peft.PeftForm | None) -> None:
    """Write lorakit.json and the tensors `beside` PEFT's. Call it last, since it records the checksums of all files.

    Raises:
        ConfigurationError: The provenance holds a value that JSON cannot represent.
    """
    if own := beside(stored, form):
        write_safetensors(folder / LORAKIT_TENSORS, own)
    record: dict[str, Any] = {
        "format": "lorakit",
        "format_version": FORMAT_VERSION,
        "lorakit_version": __version__,
        "method": _method_record(stored.method),
        "layers": {path: _describe(layer) for path, layer in stored.layers.items()},
        "modules": {path: list(tensors) for path, tensors in stored.modules.items()},
        "in_peft": _shared(stored, form),
        "base": None if stored.base is None else dataclasses.asdict(stored.base),
        "provenance": stored.provenance,
        "files": {
            path.relative_to(folder).as_posix(): storage.sha256(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path != folder / LORAKIT_JSON
        },
    }
    try:
        storage.write_record(folder / LORAKIT_JSON, record)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"The provenance cannot be written as JSON: {error}. Use texts, finite numbers, true, false, "
            "None, lists and dictionaries with texts as keys."
        ) from error


def _method_record(method: Method) -> dict[str, Any]:
    """Return a method's settings; for a combination, with those of its parts."""
    settings = dataclasses.asdict(method)
    if isinstance(method, Combined):
        settings["methods"] = [_method_record(part) for part in method.methods]
    return {"name": type(method).__name__, **settings}


def _describe(layer: StoredLayer) -> dict[str, Any]:
    """Return a layer's fields other than tensors."""
    fields = {name: getattr(layer, name) for name in _FIELDS}
    return {**fields, "slices": [dataclasses.asdict(s) for s in layer.slices]}


# --- reading -------------------------------------------------------------------------------------


def read(folder: Path) -> StoredAdapter:
    """Read a folder with a lorakit.json.

    Raises:
        AdapterFileError: A file is missing or changed, or the tensors do not match lorakit.json.
    """
    path = folder / LORAKIT_JSON
    record = storage.read_json(path)
    _check_record(record, path)
    try:
        notices = _check_files(record["files"], folder)
        tensors = _read_tensors(record, folder)
        layers = {}
        for layer_path, description in record["layers"].items():
            with located(f"'{layer_path}'"):
                layers[layer_path] = _layer(layer_path, description, tensors)
        modules = {
            path: {name: _pop(tensors, f"modules.{path}.{name}") for name in names}
            for path, names in record["modules"].items()
        }
        trained = {
            name.removeprefix("trained."): tensors.pop(name)
            for name in list(tensors)
            if name.startswith("trained.")
        }
        if tensors:
            raise AdapterFileError(f"it does not describe the tensor '{min(tensors)}' of its files")
        return StoredAdapter(
            method=_method(record["method"]),
            layers=layers,
            modules=modules,
            trained=trained,
            base=None if record["base"] is None else BaseRecord.from_json(record["base"]),
            provenance=dict(record["provenance"] or {}),
            notices=[*notices, *rank_notices(layers)],
        )
    except LorakitError as error:
        if str(error).startswith(f"'{folder}"):  # it names a file
            raise
        raise AdapterFileError(f"'{folder}': {error}") from error
    except Exception as error:  # untrusted: a value may have any type or size
        if is_momentary(error):
            raise
        raise AdapterFileError(
            f"'{path}' does not match the files beside it: {type(error).__name__}: {error}. Download or save the "
            "adapter again."
        ) from error


def _check_record(record: Mapping[str, Any], path: Path) -> None:
    """Reject a file of another format or version, unknown and missing keys, and a wrong checksum of its own."""
    version = record.get("format_version")
    if record.get("format") != "lorakit" or type(version) is not int:
        raise AdapterFileError(
            f"'{path}' does not describe a lorakit adapter: its format is {record.get('format')!r:.40} and its "
            f"format_version {version!r:.40}; 'lorakit' and a whole number were expected. Download or save the "
            "adapter again."
        )
    if version != FORMAT_VERSION:
        fix = (
            "Update lorakit."
            if version > FORMAT_VERSION
            else f"Save it again, or delete {LORAKIT_JSON} to read the folder as PEFT's."
        )
        raise AdapterFileError(
            f"'{path}' has format version {version}, but this lorakit reads version {FORMAT_VERSION}. {fix}"
        )
    storage.require_checksum(record, path, AdapterFileError)
    # An unknown key may change what the adapter computes.
    if different := sorted(record.keys() ^ _RECORD_KEYS):
        raise AdapterFileError(
            f"'{path}' has unknown keys or lacks some: {', '.join(different)}. Update lorakit, or save the adapter "
            "again."
        )


def _check_files(files: Mapping[str, str], folder: Path) -> list[str]:
    """Verify the checksum of every listed file, and return a notice of an edited card."""
    notices = []
    for name, digest in files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or any(char in name for char in "\\\0:"):
            raise AdapterFileError(
                f"{LORAKIT_JSON} lists {name!r}, which can be outside its folder, so it was not opened."
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
                f"'{folder / name}' has changed since the adapter was saved: it was damaged or edited. Download or "
                f"save the adapter again.{as_peft if name == PEFT_CONFIG else ''}"
            )
        notices.append(f"'{folder / name}' was edited after the adapter was saved.")
    return notices


def _read_tensors(record: Mapping[str, Any], folder: Path) -> dict[str, Tensor]:
    """Return all tensors in lorakit's own form, by name, from files whose checksums were verified."""
    files, in_peft = record["files"], record["in_peft"]
    tensors: dict[str, Tensor] = {}
    if LORAKIT_TENSORS in files:
        tensors |= read_safetensors(folder / LORAKIT_TENSORS)
    if in_peft and PEFT_TENSORS in files:
        theirs = read_safetensors(folder / PEFT_TENSORS)
        tensors |= {name: theirs[key] for name, key in in_peft.items()}
    return tensors


def _layer(path: str, description: Mapping[str, Any], tensors: dict[str, Tensor]) -> StoredLayer:
    """Return the layer of a description, and remove its tensors from `tensors`."""
    if different := sorted(description.keys() ^ {*_FIELDS, "slices"}):
        raise AdapterFileError(
            f"it has unknown settings or lacks some: {', '.join(different)}. Update lorakit, or save the adapter again."
        )
    parts: dict[str, Any] = {
        name: tensors.pop(f"layers.{path}.{name}", None) for name in TENSORS[2:]
    }
    return StoredLayer(
        **{name: description[name] for name in _FIELDS},
        slices=tuple(RowSlice(**piece) for piece in description["slices"]),
        A=_pop(tensors, f"layers.{path}.A"),
        B=_pop(tensors, f"layers.{path}.B"),
        **parts,
    )


def _pop(tensors: dict[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise AdapterFileError(f"the files have no tensor '{name}'.")
    return tensors.pop(name)


def _method(record: Any) -> Method:
    """Build the method that `_method_record` described."""
    name = record["name"]
    method_class = recorded_method(name)
    if method_class is None:
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
