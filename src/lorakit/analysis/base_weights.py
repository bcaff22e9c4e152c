"""A base model's parameters, read from disk one by one on access."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorakit.adapters.formats import BaseRecord, base_record, compare
from lorakit.adapters.formats.fingerprint import ArchitectureRecord, Origin, hash_weights
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.adapters.installed import base_parameters
from lorakit.analysis.deltas import weight_name
from lorakit.errors import BaseModelError, ConfigurationError, WrongBaseError, nearest
from lorakit.models.base_config import BaseConfig
from lorakit.models.gguf import converted_folder
from lorakit.models.loading import ModelHead, load_base
from lorakit.models.sources import ModelSource, resolve

_TASKS: dict[str, ModelHead] = {
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForConditionalGeneration": "seq2seq-lm",
    "ForMaskedLM": "masked-lm",
    "ForSequenceClassification": "sequence-classification",
    "ForImageClassification": "image-classification",
}
"""Task of a model, by the suffix of its class name."""
_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class Weights(Mapping[str, Tensor]):
    """Parameters by name, with or without the model class's prefix.

    A checkpoint may lack a prefix that the model class adds (``h.0...`` for ``transformer.h.0...``), or have an
    additional one. A name therefore also matches the only parameter whose name has it as a suffix, or vice versa.
    """

    def __init__(self, source: ModelSource, tensors: Mapping[str, Tensor]) -> None:
        self.source, self._tensors = source, tensors
        self.notices: list[str] = []

    def __getitem__(self, name: str) -> Tensor:
        key = self._key(name)
        if key is None:
            raise BaseModelError(
                f"'{self.source.name}' has no weight '{name}'.{nearest(name, self._tensors)} Name the base "
                "that the adapter was trained on: --base.name MODEL."
            )
        return self._tensors[key]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._key(name) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def _key(self, name: str) -> str | None:
        if name in self._tensors:
            return name
        matches = [k for k in self._tensors if k.endswith(f".{name}") or name.endswith(f".{k}")]
        return matches[0] if len(matches) == 1 else None


def open_weights(
    base: BaseConfig | None, stored: StoredAdapter, *, allow_other_base: bool = False
) -> Weights:
    """Open the weights of an adapter's base, and validate them against the base that the adapter records.

    Args:
        base: The base model; None uses the base that the adapter records.
        stored: The adapter.
        allow_other_base: Accept a base other than the recorded one, and add a notice.

    Raises:
        BaseModelError: The model does not exist, cannot be read, or lacks an adapted weight.
        ConfigurationError: `base` is None, and the adapter records no base.
        WrongBaseError: The weights differ from those that the adapter was trained on.
    """
    recorded = stored.base
    if base is None:
        name = recorded.source.name if recorded is not None else None
        if name is None:
            raise ConfigurationError(
                "The adapter does not record its base model. Name it: --base.name MODEL."
            )
        base = BaseConfig(name=name)
    weights = _open_safetensors(base)
    if weights is not None and recorded is not None:
        live = _fingerprint(weights, recorded, base)
        if live is None:
            weights = None
        else:
            weights.notices += _differences(recorded, live, allow_other_base)
    names = [weight_name(path, layer) for path, layer in stored.layers.items()]
    if weights is None or any(name not in weights for name in names):
        weights, live = _load(base, recorded)
        if recorded is not None:
            weights.notices += _differences(recorded, live, allow_other_base)
    if recorded is None:
        weights.notices.append(
            "The adapter has no fingerprint of its base, so the base was not checked."
        )
    return weights


def _differences(recorded: BaseRecord, live: BaseRecord, allow_other_base: bool) -> list[str]:
    try:
        return compare(recorded, live)
    except WrongBaseError as error:
        if not allow_other_base:
            raise
        return [f"Using another base because allow_other_base is set: {error}"]


def read_weights(base: BaseConfig) -> Weights:
    """Open a model's safetensors files, or load the whole model if it has none.

    Raises:
        BaseModelError: The model does not exist, or cannot be read.
    """
    return _open_safetensors(base) or _load(base, None)[0]


def task_of_class(class_name: str) -> ModelHead:
    """Return the task of a model class; "base" (no head) if its name has no known suffix."""
    for suffix, task in _TASKS.items():
        if class_name.endswith(suffix):
            return task
    return "base"


def config_of(base: BaseConfig) -> Any:
    """Return the transformers configuration of a model.

    Raises:
        BaseModelError: The model does not exist, or its configuration cannot be read.
    """
    return _config(resolve(base.name, revision=base.revision), base)


def _open_safetensors(base: BaseConfig) -> Weights | None:
    source = resolve(base.name, revision=base.revision)
    folder = _folder(source)
    files = _files(folder) if folder is not None else {}
    return Weights(source, _SafetensorsFiles(files)) if files else None


def _load(base: BaseConfig, recorded: BaseRecord | None) -> tuple[Weights, BaseRecord]:
    """Load the whole model: it has no safetensors files, or their tensor names differ from the parameter names."""
    class_name = "" if recorded is None else recorded.architecture.class_name
    loaded = load_base(
        base.name,
        task=task_of_class(class_name),
        dtype="float32",
        revision=base.revision,
        trust_remote_code=base.trust_remote_code,
    )
    tensors = {n: p.detach() for n, p in loaded.model.named_parameters(remove_duplicate=False)}
    excluded = () if recorded is None else recorded.excluded
    record = base_record(loaded.model, loaded.source, exclude=excluded)
    return Weights(loaded.source, tensors), record


class _SafetensorsFiles(Mapping[str, Tensor]):
    """The tensors of one or more safetensors files, memory-mapped."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = files
        self._open: dict[Path, Any] = {}

    def __getitem__(self, key: str) -> Tensor:
        path = self._files[key]
        if path not in self._open:
            self._open[path] = _open(path)
        return self._open[path].get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _folder(source: ModelSource) -> Path | None:
    if source.kind == "folder":
        return Path(source.path_or_id)
    if source.kind == "gguf":
        return converted_folder(Path(source.path_or_id))
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                source.path_or_id,
                revision=source.revision,
                allow_patterns=[_FILE, _INDEX, "model-*.safetensors", "config.json"],
            )
        )
    # Loading the whole model fails for the same reason, with a better message.
    except Exception:
        return None


def _files(folder: Path) -> dict[str, Path]:
    """Return the file of each tensor; empty if the folder has no safetensors files."""
    if (folder / _INDEX).is_file():
        try:
            weight_map = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
            files = {str(key): folder / Path(name).name for key, name in weight_map.items()}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise BaseModelError(
                f"'{folder / _INDEX}' is damaged ({type(error).__name__}). Download or copy it again."
            ) from None
        missing = [path for path in files.values() if not path.is_file()]
        if missing:
            raise BaseModelError(
                f"'{missing[0]}' is missing, but '{_INDEX}' lists it. Download or copy it again."
            )
        return files
    if (folder / _FILE).is_file():
        return dict.fromkeys(_open(folder / _FILE).keys(), folder / _FILE)
    return {}


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt").__enter__()
    except (OSError, SafetensorError) as error:
        raise BaseModelError(
            f"'{path}' cannot be read: {error}. Download or copy it again."
        ) from error


def _config(source: ModelSource, base: BaseConfig) -> Any:
    from transformers import AutoConfig

    folder = _folder(source)
    try:
        return AutoConfig.from_pretrained(
            folder or source.path_or_id,
            revision=source.revision if folder is None else None,
            trust_remote_code=base.trust_remote_code,
        )
    except Exception as error:  # transformers raises many kinds of exceptions here
        raise BaseModelError(
            f"The configuration of '{source.name}' cannot be read: {' '.join(str(error).split())[:300]}"
        ) from error


def _fingerprint(weights: Weights, recorded: BaseRecord, base: BaseConfig) -> BaseRecord | None:
    """Return the fingerprint of the weights on disk, without building the model.

    None if the files lack parameters of the class that the adapter records.
    """
    import transformers

    model_class = getattr(transformers, recorded.architecture.class_name, None)
    if not (
        isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)
    ):
        return None
    config = _config(weights.source, base)
    if not isinstance(config, model_class.config_class):  # type: ignore[arg-type]
        name = (config.architectures or [type(config).__name__])[0]
        other = ArchitectureRecord(class_name=name, model_type=config.model_type, shapes="")
        source = Origin(weights.source.name, weights.source.revision)
        return dataclasses.replace(recorded, architecture=other, source=source)
    with torch.device("meta"):
        shapes = model_class(config)
    names = [name for name, _ in base_parameters(shapes) if name not in recorded.excluded]
    if any(name not in weights for name in names):
        return None
    live = base_record(shapes, weights.source, exclude=recorded.excluded)
    hashed = hash_weights((name, weights[name]) for name in names)
    return dataclasses.replace(live, weights=hashed)
