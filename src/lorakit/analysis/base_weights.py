"""A base model's parameters, each read from disk when a measure asks for it."""

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
"""What a model is for, by the end of its class's name."""
_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class Weights(Mapping[str, Tensor]):
    """Parameters by the names that an adapter's layers have.

    A checkpoint may leave out a prefix that the model class adds (``h.0...`` for
    ``transformer.h.0...``), or have one more: a name stands for the one that ends like it.
    """

    def __init__(
        self, source: ModelSource, tensors: Mapping[str, Tensor], notices: list[str] | None = None
    ) -> None:
        self.source, self._tensors = source, tensors
        self.notices = notices or []

    def __getitem__(self, name: str) -> Tensor:
        key = self._key(name)
        if key is None:
            raise BaseModelError(
                f"'{self.source.name}' has no weight '{name}'.{nearest(name, self._tensors)} Name the base "
                "that the adapter was made for."
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
        alike = [k for k in self._tensors if k.endswith(f".{name}") or name.endswith(f".{k}")]
        return alike[0] if len(alike) == 1 else None


def open_weights(
    base: BaseConfig | None, stored: StoredAdapter, *, allow_other_base: bool = False
) -> Weights:
    """The weights of an adapter's base, checked against what the adapter records of it.

    Args:
        base: The base model; None takes the one that the adapter records.
        stored: The adapter.
        allow_other_base: Go on with another base than the recorded one, and say so in the notices.

    Raises:
        BaseModelError: There is no such model, it cannot be read, or it lacks a weight that is adapted.
        ConfigurationError: None is named, and the adapter does not record one.
        WrongBaseError: The weights are not those that the adapter was made for.
    """
    base, recorded = base or recorded_base(stored), stored.base
    weights = _mapped(base)
    checked = weights is not None and _check(weights, recorded, base, allow_other_base)
    needed = [weight_name(path, layer) for path, layer in stored.layers.items()]
    if weights is None or not checked or any(name not in weights for name in needed):
        weights, live = _loaded(base, recorded)
        if recorded is not None:
            weights.notices += _differences(recorded, live, allow_other_base)
    if recorded is None:
        weights.notices.append(
            "The adapter has no fingerprint of its base: that the base is the right one was not checked."
        )
    return weights


def _check(
    weights: Weights, recorded: BaseRecord | None, base: BaseConfig, allow_other_base: bool
) -> bool:
    """Whether the files are the recorded base's, or nothing is recorded; False where they do not tell."""
    if recorded is None:
        return True
    live = _fingerprint(weights, recorded, base)
    if live is not None:
        weights.notices += _differences(recorded, live, allow_other_base)
    return live is not None


def _differences(recorded: BaseRecord, live: BaseRecord, allow_other_base: bool) -> list[str]:
    try:
        return compare(recorded, live)
    except WrongBaseError as error:
        if not allow_other_base:
            raise
        return [f"read on another base because allow_other_base is set: {error}"]


def recorded_base(stored: StoredAdapter) -> BaseConfig:
    """The base that an adapter records.

    Raises:
        ConfigurationError: It records none.
    """
    name = stored.base.source.name if stored.base is not None else None
    if name is None:
        raise ConfigurationError(
            "The adapter does not say which base it was made for. Name it: --base.name MODEL."
        )
    return BaseConfig(name=name)


def read_weights(base: BaseConfig) -> Weights:
    """The weights of a model: read one by one from safetensors files, else loaded as a whole.

    Raises:
        BaseModelError: There is no such model, or it cannot be read.
    """
    return _mapped(base) or _loaded(base, None)[0]


def task_of_class(class_name: str) -> ModelHead:
    """What a model of this class is for; "base" (no head) where the name does not say."""
    for end, task in _TASKS.items():
        if class_name.endswith(end):
            return task
    return "base"


def config_of(base: BaseConfig) -> Any:
    """The transformers configuration of a model.

    Raises:
        BaseModelError: There is no such model, or its configuration cannot be read.
    """
    return _config(resolve(base.name, revision=base.revision), base)


def _mapped(base: BaseConfig) -> Weights | None:
    source = resolve(base.name, revision=base.revision)
    folder = _folder(source)
    files = _files(folder) if folder is not None else {}
    return Weights(source, _SafetensorsFiles(files)) if files else None


def _loaded(base: BaseConfig, recorded: BaseRecord | None) -> tuple[Weights, BaseRecord]:
    """The model as a whole: its checkpoint is no safetensors file, or names its weights otherwise."""
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
    """The tensors of one or more safetensors files; what is returned is mapped, not copied."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = files
        self._open: dict[Path, Any] = {}

    def __getitem__(self, key: str) -> Tensor:
        path = self._files[key]
        if path not in self._open:
            self._open[path] = _opened(path)
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
    # Loading the model as a whole meets the same obstacle, and explains it.
    except Exception:
        return None


def _files(folder: Path) -> dict[str, Path]:
    """The file of each tensor; empty where the folder has none in safetensors."""
    if (folder / _INDEX).is_file():
        try:
            listed = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
            named = {str(key): folder / Path(name).name for key, name in listed.items()}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise BaseModelError(
                f"'{folder / _INDEX}' is damaged ({type(error).__name__}). Fetch or copy it again."
            ) from None
        missing = [path for path in named.values() if not path.is_file()]
        if missing:
            raise BaseModelError(
                f"'{missing[0]}' is missing, which '{_INDEX}' lists. Fetch or copy it again."
            )
        return named
    if (folder / _FILE).is_file():
        return dict.fromkeys(_opened(folder / _FILE).keys(), folder / _FILE)
    return {}


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt").__enter__()
    except (OSError, SafetensorError) as error:
        raise BaseModelError(
            f"'{path}' cannot be read: {error}. Fetch or copy it again."
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
    except Exception as error:  # an outside input: its readers raise nearly every kind of exception
        raise BaseModelError(
            f"The configuration of '{source.name}' cannot be read: {' '.join(str(error).split())[:300]}"
        ) from error


def _fingerprint(weights: Weights, recorded: BaseRecord, base: BaseConfig) -> BaseRecord | None:
    """The fingerprint of the weights on disk, taken without building the model.

    None where the class that the adapter was made for has parameters that the files do not name.
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
