"""lorakit.json: what PEFT's files cannot say, and a checksum of every file beside it.

In a folder that PEFT can load the tensors are in PEFT's form (`peft.factors`), and lorakit.json says
how each layer was. Where PEFT has no equal, they are in `lorakit_model.safetensors` as they are, and
there is no adapter_config.json that would promise otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from lorakit import storage
from lorakit.adapters.formats import peft
from lorakit.adapters.formats.fingerprint import BaseRecord
from lorakit.adapters.formats.peft.factors import Factors, from_peft, peft_rank
from lorakit.adapters.formats.peft.writing import factor_keys
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.adapters.formats.stored_layer import StoredLayer, at, rank_notices
from lorakit.errors import AdapterFileError, ConfigurationError, LorakitError
from lorakit.methods import METHODS, Combined, Method
from lorakit.methods.registry import recorded_method
from lorakit.models.roles import RowSlice
from lorakit.storage.tensors import read_safetensors, write_safetensors
from lorakit.version import __version__

NAME = "lorakit.json"
TENSORS_NAME = "lorakit_model.safetensors"
FORMAT_VERSION = 1
CARD_NAME = "README.md"


def write_tensors(stored: StoredAdapter, folder: Path) -> None:
    """Write an adapter's tensors as they are, for a folder that PEFT cannot load."""
    tensors = {
        f"layers.{path}.{name}": tensor
        for path, layer in stored.layers.items()
        for name, tensor in layer.tensors.items()
    }
    tensors.update({f"modules.{name}": tensor for name, tensor in stored.module_tensors.items()})
    tensors.update({f"trained.{name}": tensor for name, tensor in stored.trained.items()})
    write_safetensors(folder / TENSORS_NAME, tensors)


def write(stored: StoredAdapter, folder: Path, form: peft.PeftForm | None) -> None:
    """Write lorakit.json, last of all files, as it holds the checksums of the others.

    Args:
        stored: The adapter.
        folder: Where its tensors and everything else have been written.
        form: Its form as PEFT's, or None where the tensors are in `lorakit_model.safetensors`.

    Raises:
        ConfigurationError: The provenance holds something that JSON has no form for.
    """
    record: dict[str, Any] = {
        "format": "lorakit",
        "format_version": FORMAT_VERSION,
        "lorakit_version": __version__,
        "method": _method_record(stored.method),
        "tensors": TENSORS_NAME if form is None else peft.TENSORS_NAME,
        "layers": {
            path: _describe(layer, None if form is None else form.layer_keys[path])
            for path, layer in stored.layers.items()
        },
        "modules": {path: list(own) for path, own in stored.modules.items()},
        "trained": {
            name: None if form is None else form.trained_keys[name] for name in stored.trained
        },
        "repeated": [] if form is None else _repeated(form, stored),
        "base": None if stored.base is None else stored.base.to_json(),
        "provenance": stored.provenance,
        "files": {
            path.relative_to(folder).as_posix(): storage.sha256(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path != folder / NAME
        },
    }
    try:
        storage.write_record(folder / NAME, record)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"The provenance cannot be written as JSON: {error}. Use texts, finite numbers, true, false, "
            "None, lists and dictionaries with texts as keys."
        ) from error


def read(folder: Path) -> StoredAdapter:
    """Read a folder with a lorakit.json.

    Raises:
        AdapterFileError: A file is missing or was changed, or the content is not as described.
    """
    path = folder / NAME
    record = storage.read_json(storage.regular_file(path))
    _check_record(record, path)
    notices = _check_files(record, folder)
    tensors_name = record.get("tensors")
    if tensors_name not in (TENSORS_NAME, peft.TENSORS_NAME) or tensors_name not in record["files"]:
        raise AdapterFileError(f"'{path}' names {tensors_name!r} as the file of its tensors.")
    tensors = read_safetensors(folder / tensors_name)
    try:
        restore = _restore_own if tensors_name == TENSORS_NAME else _restore_from_peft
        modules = _take_modules(record, tensors)
        layers, trained = restore(record, tensors)
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
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise AdapterFileError(
            f"'{path}' does not describe '{folder / tensors_name}': {type(error).__name__}: {error}."
        ) from error


# --- writing -------------------------------------------------------------------------------------


def _method_record(method: Method) -> dict[str, Any]:
    """A method's settings; a combination's with those of its parts."""
    settings = dataclasses.asdict(method)
    if isinstance(method, Combined):
        settings["methods"] = [_method_record(part) for part in method.methods]
    return {"name": type(method).__name__, **settings}


def _describe(layer: StoredLayer, key: str | None) -> dict[str, Any]:
    described: dict[str, Any] = {
        "kind": layer.kind,
        "rank": layer.rank,
        "alpha": layer.alpha,
        "scaling": layer.scaling,
        "A": list(layer.A.shape),
        "B": list(layer.B.shape),
        "slices": [dataclasses.asdict(s) for s in layer.slices],
        "pissa": layer.initial_A is not None,
        "dora": layer.magnitude is not None,
        "grouped": layer.grouped,
        "transposed": layer.transposed,
        "weight_shape": None if layer.weight_shape is None else list(layer.weight_shape),
        "tied_head": layer.tied_head,
    }
    return described if key is None else {**described, "key": key}


def _repeated(form: peft.PeftForm, stored: StoredAdapter) -> list[str]:
    """Keys that PEFT needs and that say nothing new: tied copies, zeros that fill up a module."""
    read = set(form.trained_keys.values())
    for path, layer in stored.layers.items():
        dora = layer.magnitude is not None
        read.update(factor_keys(form.layer_keys[path], layer.kind, dora=dora).values())
    return sorted(form.tensors.keys() - read)


# --- reading -------------------------------------------------------------------------------------


def _check_record(record: Mapping[str, Any], path: Path) -> None:
    version = record.get("format_version")
    if (
        record.get("format") != "lorakit"
        or isinstance(version, bool)
        or not isinstance(version, int)
    ):
        raise AdapterFileError(f"'{path}' is not the record of a lorakit adapter.")
    if version > FORMAT_VERSION:
        raise AdapterFileError(
            f"'{path}' has format version {version}, and this lorakit reads up to {FORMAT_VERSION}. "
            "Update lorakit."
        )
    storage.require_checksum(record, path, AdapterFileError)


def _check_files(record: Mapping[str, Any], folder: Path) -> list[str]:
    files = record.get("files")
    if not isinstance(files, Mapping):
        raise AdapterFileError(f"'{folder / NAME}' lists no files.")
    notices = []
    for name, digest in files.items():
        parts = PurePosixPath(name)
        if (
            parts.is_absolute()
            or ".." in parts.parts
            or "\\" in name
            or "\0" in name
            or ":" in name
        ):
            raise AdapterFileError(
                f"'{folder / NAME}' lists {name!r}, which may lie outside of its folder. It was not opened."
            )
        if name == CARD_NAME and not (folder / name).exists():
            continue
        if storage.sha256(storage.regular_file(folder / name)) == digest:
            continue
        if name != CARD_NAME:
            raise AdapterFileError(
                f"'{folder / name}' has changed since the adapter was saved: it is damaged, or was edited. "
                "Fetch or save the adapter again."
            )
        notices.append(f"'{folder / name}' was edited after the adapter was saved.")
    return notices


def _method(found: Any) -> Method:
    name = found.get("name") if isinstance(found, Mapping) else found
    kind = recorded_method(name)
    if kind is None or not isinstance(found, Mapping):
        raise AdapterFileError(
            f"its method is {name!r}; this lorakit knows {', '.join(METHODS)}. Update lorakit, or, where the method is "
            "one of your own, say where its class is: method path/to/file.py:Class (in Python lorakit.use_method)."
        )
    settings = {
        key: tuple(v) if isinstance(v, list) else v for key, v in found.items() if key != "name"
    }
    if kind is Combined:
        settings["methods"] = tuple(map(_method, found["methods"]))
    unknown = settings.keys() - {f.name for f in dataclasses.fields(kind)}
    if unknown:
        raise AdapterFileError(
            f"its method has settings that are not known here: {sorted(unknown)}."
        )
    return kind(**settings)


def _take_modules(
    record: Mapping[str, Any], tensors: dict[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Take the tensors of other methods than LoRA out of `tensors`."""
    modules: dict[str, dict[str, Tensor]] = {}
    for path, names in record.get("modules", {}).items():
        for name in names:
            key = f"modules.{path}.{name}"
            if key not in tensors:
                raise AdapterFileError(f"'{path}' has no '{name}' in the file of tensors.")
            modules.setdefault(path, {})[name] = tensors.pop(key)
    return modules


def _restore_own(
    record: Mapping[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, StoredLayer], dict[str, Tensor]]:
    left = dict(tensors)
    layers = {}
    for path, described in record["layers"].items():
        names = ("A", "B", "magnitude", "initial_A", "initial_B", "base_norms")
        present = {name: left.pop(f"layers.{path}.{name}", None) for name in names}
        if present["A"] is None or present["B"] is None:
            raise AdapterFileError(f"'{path}' has no A or no B.")
        for name in ("A", "B"):
            _expect_shape(f"{name} of '{path}'", present[name], described[name])
        layers[path] = _build(path, described, present)
    trained = {name: left.pop(f"trained.{name}", None) for name in record["trained"]}
    return layers, _complete(trained, left)


def _restore_from_peft(
    record: Mapping[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, StoredLayer], dict[str, Tensor]]:
    left = dict(tensors)
    layers = {}
    for path, described in record["layers"].items():
        # The shapes said must be those of the tensors there, before anything of their size is made.
        keys = factor_keys(described["key"], described["kind"], dora=described["dora"])
        found = {name: left.pop(key, None) for name, key in keys.items()}
        A, B, magnitude = (found.get(name) for name in ("A", "B", "magnitude"))
        if A is None or B is None or (described["dora"] and magnitude is None):
            missing = next(key for name, key in keys.items() if found[name] is None)
            raise AdapterFileError(f"'{path}' has no '{missing}'.")
        for factor, name in ((A, "A"), (B, "B")):
            if torch.Size(described[name]).numel() > factor.numel():
                raise AdapterFileError(f"'{path}' cannot have a {name} of shape {described[name]}.")
        for piece in described["slices"]:
            if piece["groups"] * piece["stride"] != B.shape[0]:
                raise AdapterFileError(f"'{path}' cannot have the slice {piece}.")
        A0, B0 = (torch.empty(described[name], device="meta") for name in ("A", "B"))
        initial = (A0, B0) if described["pissa"] else (None, None)
        shapes = {"A": A0, "B": B0, "initial_A": initial[0], "initial_B": initial[1]}
        if magnitude is not None:
            shapes["magnitude"] = torch.empty(B0.shape[0], device="meta")
        pattern = _build(path, described, shapes)
        rank = peft_rank(pattern)
        A, B = A[:rank], B[:, : rank // pattern.groups]
        magnitude = None if magnitude is None else magnitude.flatten()
        try:
            layers[path] = from_peft(pattern, Factors(A, B, magnitude, pattern.rank))
        except AdapterFileError as error:
            raise at(f"'{path}'", error) from error
    trained = {name: left.pop(key, None) for name, key in record["trained"].items()}
    for key in record["repeated"]:
        left.pop(key, None)
    return layers, _complete(trained, left)


def _build(path: str, described: Mapping[str, Any], tensors: Mapping[str, Any]) -> StoredLayer:
    shape = described["weight_shape"]
    try:
        return StoredLayer(
            kind=described["kind"],
            alpha=described["alpha"],
            scaling=described["scaling"],
            slices=tuple(RowSlice(**piece) for piece in described["slices"]),
            grouped=described["grouped"],
            transposed=described["transposed"],
            weight_shape=None if shape is None else tuple(shape),
            tied_head=described["tied_head"],
            **tensors,
        )
    except AdapterFileError as error:
        raise at(f"'{path}'", error) from error


def _expect_shape(what: str, tensor: Tensor | None, shape: list[int]) -> None:
    if tensor is not None and list(tensor.shape) != shape:
        raise AdapterFileError(f"{what} has shape {tuple(tensor.shape)}, not {tuple(shape)}.")


def _complete(
    trained: Mapping[str, Tensor | None], left: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    found = {name: tensor for name, tensor in trained.items() if tensor is not None}
    missing = trained.keys() - found.keys()
    if missing:
        raise AdapterFileError(f"the trained '{min(missing)}' is not in the file of tensors.")
    if left:
        raise AdapterFileError(
            f"the file of tensors holds {len(left)} that {NAME} does not list, the first '{min(left)}'."
        )
    return found
