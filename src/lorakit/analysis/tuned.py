"""The fine-tuned model from which an adapter is extracted: a whole model, or a folder of lorakit's full fine-tuning."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lorakit.adapters import formats
from lorakit.adapters.export import tied_names
from lorakit.adapters.formats import lorakit_json
from lorakit.adapters.installed import base_parameters, grouped_base_parameters
from lorakit.analysis.base_weights import (
    Weights,
    empty_model,
    load_float32,
    read_weights,
    weights_of,
)
from lorakit.compute.adapter_file import AdapterFile, recorded_task
from lorakit.errors import AdapterFileError, BaseModelError
from lorakit.formatting import listed
from lorakit.models.base_config import BaseConfig
from lorakit.models.config_fields import changed_fields, computing_fields
from lorakit.models.heads import classification_head, input_embeddings
from lorakit.models.layers import is_inside
from lorakit.models.loading import Base, load_tokenizer
from lorakit.models.locating import locate
from lorakit.models.sources import resolve

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def open_tuned(base: BaseConfig, tuned: str | Path) -> WholeModel | FullFineTuned:
    """Open a fine-tuned model without reading its weights, or a folder of lorakit's full fine-tuning.

    Raises:
        AdapterFileError: It is an adapter, or the folder cannot be read.
        BaseModelError: The model does not exist, or its configuration cannot be read.
    """
    if not (Path(tuned) / lorakit_json.NAME).is_file():
        source = dataclasses.replace(base, name=str(tuned), revision=None)
        return WholeModel(source, empty_model(source))
    stored = formats.read(tuned)
    if stored.layers or stored.modules:
        raise AdapterFileError(
            f"'{tuned}' is an adapter already ({type(stored.method).__name__}); a fully fine-tuned model was expected. "
            "lorakit compress changes the rank of an adapter."
        )
    return FullFineTuned(base, AdapterFile(str(tuned), stored))


@dataclass(frozen=True)
class WholeModel:
    """A model in a folder, on the hub or in a GGUF file."""

    source: BaseConfig
    empty: PreTrainedModel
    """The model on the meta device, which has the configuration and the names of the weights."""

    def open_base(self, base: BaseConfig, train_modules: tuple[str, ...]) -> Base:
        """Load the base in float32, with the head of this model if `train_modules` names a new head."""
        if set(train_modules).isdisjoint(classification_head(self.empty)):
            return load_float32(base)
        return load_float32(base, type(self.empty).__name__, self.empty.config.num_labels)

    def weights(self, base: Base, targeted: Sequence[str]) -> Weights:
        """Open the weights under the names of this model; the whole model is loaded if its files have other names.

        Raises:
            BaseModelError: A targeted weight has another name in the files, and the model cannot be loaded.
        """
        groups = [names for names, *_ in grouped_base_parameters(self.empty)]
        weights = read_weights(self.source)
        held = [next((n for n in names if n in weights), names[0]) for names in groups]
        try:
            weights = read_weights(self.source, held)
        except BaseModelError:  # the checkpoint may lack a weight that extraction does not need
            if any(name not in weights for name in targeted):
                raise
        return weights.with_tied(groups)

    def differences(self, base: Base, weights: Weights) -> list[str]:
        """Return sentences about what an adapter of this base cannot hold: configuration, weights that one side has."""
        sentences = []
        then, now = base.model.config, self.empty.config
        changed = changed_fields(computing_fields(then), computing_fields(now), training=False)
        if then.model_type != now.model_type:
            changed.insert(0, f"model_type {then.model_type} -> {now.model_type}")
        if changed:
            sentences.append(
                "An adapter cannot hold what differs in the configuration (base -> fine-tuned model): "
                f"{listed(changed)}."
            )
        of_base = weights_of(base)
        groups = [names for names, *_ in grouped_base_parameters(self.empty)]
        if added := [names[0] for names in groups if not any(n in of_base for n in names)]:
            heads = classification_head(self.empty)
            copied = [head for head in heads if any(is_inside(name, head) for name in added)]
            advice = f" To copy the new head, set train_modules to [{', '.join(copied)}]."
            sentences.append(
                f"The base and the adapter lack {len(added)} weights of the fine-tuned model: {listed(added, 3)}."
                f"{advice if copied else ''}"
            )
        if lacking := [name for name, _ in base_parameters(base.model) if name not in weights]:
            sentences.append(
                f"The fine-tuned model lacks {len(lacking)} weights of the base: {listed(lacking, 3)}."
            )
        return sentences

    def load(self) -> PreTrainedModel:
        """Load the model in float32."""
        return load_float32(self.source).model

    def tokenizer(self, base: Base) -> tuple[PreTrainedTokenizerBase | None, list[str]]:
        """Return the tokenizer, None if it has none or the base cannot use it, and a notice about the latter."""
        source = self.source
        where = resolve(source.name, revision=source.revision)
        files = locate(where, source.trust_remote_code, weights=False).files
        if not any(fnmatch(name, own) for name in files for own in formats.TOKENIZER_FILES):
            return None, []
        try:
            found = load_tokenizer(source.name, trust_remote_code=source.trust_remote_code)
        except BaseModelError as error:
            return None, [f"The adapter has no tokenizer of its own: {error}"]
        ids = 1 + max(found.get_vocab().values())
        rows = getattr(input_embeddings(base.model), "num_embeddings", ids)
        if ids <= rows:
            return found, []
        return None, [
            f"The adapter has no tokenizer of its own: that of '{source.name}' has {ids} ids, but the base only {rows} "
            "embeddings."
        ]


@dataclass(frozen=True)
class FullFineTuned:
    """A folder of lorakit's full fine-tuning. Weights that were not trained are those of the base."""

    base: BaseConfig
    file: AdapterFile

    def open_base(self, base: BaseConfig, train_modules: tuple[str, ...]) -> Base:
        """Load the base in float32, with the head that was trained."""
        record, task = self.file.stored.base, recorded_task(self.file)
        labels = None if task is None else len(task.labels) or (task.kind == "regression") or None
        return load_float32(base, record and record.architecture.class_name, labels)

    def weights(self, base: Base, targeted: Sequence[str]) -> Weights:
        """Return the trained weights, and those of the base under the other names."""
        trained = {name: tensor.detach for name, tensor in self.file.stored.trained.items()}
        others = {name: parameter.detach for name, parameter in base_parameters(base.model)}
        return Weights(base.source, others | trained).with_tied(tied_names(base.model))

    def differences(self, base: Base, weights: Weights) -> list[str]:
        """Return sentences about the base, which is compared with the recorded one.

        Raises:
            WrongBaseError: It is another base.
        """
        stored, sentences = self.file.stored, []
        if stored.base is not None:
            live = formats.base_record(base.model, exclude=tuple(stored.trained))
            sentences += formats.compare(stored.base, live)
        if all(name in stored.trained for name, _ in base_parameters(base.model)):
            sentences.append(
                "All weights were trained, so whether training started from this base cannot be checked."
            )
        return sentences

    def load(self) -> PreTrainedModel:
        """Load the base in float32, and copy the trained weights into it."""
        model = self.open_base(self.base, ()).model
        with torch.no_grad():
            for name, tensor in self.file.stored.trained.items():
                model.get_parameter(name).copy_(tensor)
        return model

    def tokenizer(self, base: Base) -> tuple[None, list[str]]:
        """Return None: a computed adapter has the tokenizer of the folders that it comes from."""
        return None, []
