"""A base model's parameters, read from disk one by one on access."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorakit.adapters.formats import BaseRecord, base_record, compare
from lorakit.adapters.formats.fingerprint import hash_weights
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.adapters.installed import base_parameters
from lorakit.analysis.deltas import read, weight_name
from lorakit.compute.adapted import base_of
from lorakit.compute.adapter_file import AdapterFile
from lorakit.compute.memory import free_memory
from lorakit.errors import BaseModelError, WrongBaseError, nearest
from lorakit.models.base_config import BaseConfig, as_base_config
from lorakit.models.base_shape import Shape, build_model, shape_of
from lorakit.models.dtypes import FLOATS, dtype_name
from lorakit.models.gguf import converted_folder
from lorakit.models.loading import Base, load_base
from lorakit.models.model_classes import ModelHead, head_of_class
from lorakit.models.packed import packed_layers
from lorakit.models.sources import ModelSource, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def _quantised(source: ModelSource, name: str, how: str) -> BaseModelError:
    return BaseModelError(
        f"'{source.name}' stores '{name}' in {how}, so it is quantised; one of "
        f"{', '.join(map(dtype_name, FLOATS))} was expected. Name the unquantised model."
    )


class Weights(Mapping[str, Tensor]):
    """Parameters by name, with or without the model class's prefix.

    A checkpoint may lack a prefix that the model class adds (``h.0...`` for ``transformer.h.0...``), or have an
    additional one. A name therefore also matches the only parameter whose name has it as a suffix, or vice versa.
    """

    def __init__(self, source: ModelSource, readers: Mapping[str, Callable[[], Tensor]]) -> None:
        self.source, self._readers = source, readers
        self.notices: list[str] = []

    def __getitem__(self, name: str) -> Tensor:
        key = self._key(name)
        if key is None:
            start = name.rpartition(".")[0]
            others = (k for k in self._readers if k.rpartition(".")[0] == start)
            dtypes = {k: self._readers[k]().dtype for k in others}
            if packed := next((k for k, dtype in dtypes.items() if dtype not in FLOATS), None):
                raise _quantised(self.source, name, packed.rpartition(".")[2])
            raise BaseModelError(
                f"'{self.source.name}' has no weight '{name}'.{nearest(name, self._readers)} Name the base "
                "that the adapter was trained on: --base.name MODEL."
            )
        tensor = self._readers[key]()
        if tensor.dtype not in FLOATS:
            raise _quantised(self.source, name, dtype_name(tensor.dtype))
        return tensor

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._key(name) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def with_tied(self, groups: Iterable[Sequence[str]]) -> Weights:
        """Return the weights with every name of each group of tied ones: a file may hold one name of a group only."""
        readers = dict(self._readers)
        for names in groups:
            keys = [self._key(name) for name in names]
            held = next((key for key in keys if key is not None), None)
            if held is not None:
                absent = [name for name, key in zip(names, keys, strict=True) if key is None]
                readers |= dict.fromkeys(absent, self._readers[held])
        return Weights(self.source, readers)

    def _key(self, name: str) -> str | None:
        if name in self._readers:
            return name
        matches = [k for k in self._readers if k.endswith(f".{name}") or name.endswith(f".{k}")]
        return matches[0] if len(matches) == 1 else None


def open_weights(
    base: BaseConfig | str | None,
    adapter: StoredAdapter | str | Path,
    *,
    alpha: float | None = None,
    allow_other_base: bool = False,
) -> Weights:
    """Open the weights of an adapter's base, and validate them against the base that the adapter records.

    Args:
        base: The base model, or its name; None uses the base that the adapter records.
        adapter: A lorakit or PEFT folder, a loralib file, or an adapter already read.
        alpha: alpha of a loralib file, which does not record it.
        allow_other_base: Accept a base other than the recorded one, and add a notice.

    Raises:
        AdapterFileError: The adapter cannot be read.
        BaseModelError: The model does not exist, cannot be read, or lacks an adapted weight.
        ConfigurationError: `base` is None, and the adapter records no base.
        WrongBaseError: The weights differ from those that the adapter was trained on.
    """
    stored = read(adapter, alpha=alpha)
    recorded = stored.base
    path = "file" if isinstance(adapter, StoredAdapter) else str(adapter)  # for a message
    base = base_of(base, AdapterFile(path, stored))
    weights = open_safetensors(base)
    if weights is not None and recorded is not None:
        live = _fingerprint(weights, recorded, base)
        if live is None:
            weights = None
        else:
            weights.notices += _differences(recorded, live, allow_other_base)
    names = [weight_name(path, layer) for path, layer in stored.layers.items()]
    if weights is None or any(name not in weights for name in names):
        loaded = load_float32(base, recorded.class_name if recorded else None)
        weights = weights_of(loaded)
        if recorded is not None:
            live = base_record(loaded.model, loaded.source, exclude=recorded.excluded)
            weights.notices += _differences(recorded, live, allow_other_base)
    if recorded is None:
        weights.notices.append(
            "The adapter records no fingerprint of its base, so the base was not checked."
        )
    return weights


def _differences(recorded: BaseRecord, live: BaseRecord, allow_other_base: bool) -> list[str]:
    try:
        return compare(recorded, live)
    except WrongBaseError as error:
        if not allow_other_base:
            raise
        return [f"Using another base because allow_other_base is set: {error}"]


def read_weights(base: BaseConfig | str) -> Weights:
    """Open a model's safetensors files, or load the whole model if it has none.

    Raises:
        BaseModelError: The model does not exist, or cannot be read.
    """
    base = as_base_config(base)
    weights = open_safetensors(base)
    return weights_of(load_float32(base)) if weights is None else weights


def load_float32(
    base: BaseConfig, class_name: str | None = None, num_labels: int | None = None
) -> Base:
    """Load a whole model in float32, with the head of a model class; no head for an unknown suffix.

    Args:
        base: The model.
        class_name: Name of the class; None is the first one that the configuration of the model names.
        num_labels: Number of outputs of a classifier, 1 for a score; None is that of the configuration.

    Raises:
        BaseModelError: The model does not exist, or cannot be read, or another library than bitsandbytes has quantised
            it.
    """
    free_memory()  # an adapted base has reference cycles, and this one may follow another
    head = _head_of(_shape_of(base), class_name)
    if head == "sequence-classification" and num_labels == 1:
        head, num_labels = "regression", None
    loaded = load_base(
        base.name,
        task=head,
        num_labels=num_labels,
        dtype="float32",
        revision=base.revision,
        trust_remote_code=base.trust_remote_code,
    )
    if (packed := next(packed_layers(loaded.model), None)) is not None:
        path, _, kind = packed
        raise _quantised(loaded.source, f"{path}.weight", kind)
    return loaded


def empty_model(base: BaseConfig, class_name: str | None = None) -> PreTrainedModel:
    """Build the model of `load_float32` on the meta device, without weights, or raise a BaseModelError."""
    shape = _shape_of(base)
    with torch.device("meta"):
        return build_model(shape, _head_of(shape, class_name))


def _head_of(shape: Shape, class_name: str | None) -> ModelHead:
    """Return the head of a model class, by default of the first one that the configuration names."""
    named = (shape.config.architectures or [""])[0] if class_name is None else class_name
    return head_of_class(named, is_encoder_decoder=shape.is_encoder_decoder) or "base"


def _shape_of(base: BaseConfig) -> Shape:
    """Return name and configuration of a model, or raise a BaseModelError; the configuration names its class."""
    source = resolve(base.name, revision=base.revision)
    if source.kind == "gguf":  # the description of an unconverted file names no class
        converted_folder(Path(source.path_or_id))
    return shape_of(base)


def open_safetensors(base: BaseConfig) -> Weights | None:
    """Open a model's safetensors files; None if it has none.

    Raises:
        BaseModelError: The model does not exist, or a file is missing or damaged.
    """
    source = resolve(base.name, revision=base.revision)
    folder = _folder(source)
    files = [] if folder is None else [_open(path) for path in _files(folder)]
    readers = {key: partial(file.get_tensor, key) for file in files for key in file.keys()}  # noqa: SIM118
    return Weights(source, readers) if readers else None


def weights_of(loaded: Base) -> Weights:
    """Return the parameters of a loaded model, under every name of a tied one, without those that are random."""
    parameters = loaded.model.named_parameters(remove_duplicate=False)
    readers = {n: p.detach for n, p in parameters if n not in loaded.new_weights}
    return Weights(loaded.source, readers)


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


def _files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder, possibly none."""
    if (folder / _FILE).is_file():  # as transformers: an index beside it is of an earlier save
        return [folder / _FILE]
    if not (folder / _INDEX).is_file():
        return []
    try:
        weight_map = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = sorted({folder / Path(name).name for name in weight_map.values()})
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise BaseModelError(
            f"'{folder / _INDEX}' is damaged ({type(error).__name__}). Download or copy it again."
        ) from None
    for path in files:
        if not path.is_file():
            raise BaseModelError(
                f"'{path}' is missing, but '{_INDEX}' lists it. Download or copy it again."
            )
    return files


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt").__enter__()
    except (OSError, SafetensorError) as error:
        raise BaseModelError(
            f"'{path}' cannot be read: {error}. Download or copy it again."
        ) from error


def _fingerprint(weights: Weights, recorded: BaseRecord, base: BaseConfig) -> BaseRecord | None:
    """Return the fingerprint of the weights on disk, without building the model.

    None if the files lack parameters of the class that the adapter records.
    """
    import transformers

    model_class = getattr(transformers, recorded.class_name, None)
    if not (
        isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)
    ):
        return None
    config = _shape_of(base).config
    if not isinstance(config, model_class.config_class):  # type: ignore[arg-type]
        name = (config.architectures or [type(config).__name__])[0]
        source = weights.source
        return dataclasses.replace(
            recorded,
            class_name=name,
            model_type=config.model_type,
            shapes="",
            name=source.name,
            revision=source.revision,
        )
    with torch.device("meta"):
        shapes = model_class(config)
    names = [name for name, _ in base_parameters(shapes) if name not in recorded.excluded]
    if any(name not in weights for name in names):
        return None
    live = base_record(shapes, weights.source, exclude=recorded.excluded)
    hashed = hash_weights((name, weights[name]) for name in names)
    return dataclasses.replace(live, **hashed._asdict())
