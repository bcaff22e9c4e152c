"""The fine-tuned model from which an adapter is extracted: a whole model, or a folder of lorakit's full fine-tuning."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from lorakit.adapters import formats
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.adapters.installed import base_parameters, grouped_base_parameters
from lorakit.adapters.ties import tied_names
from lorakit.analysis import base_weights
from lorakit.analysis.base_weights import Weights, empty_model, load_float32
from lorakit.compute.adapted import require_known_tokens
from lorakit.errors import AdapterFileError, BaseModelError, LorakitError
from lorakit.file_names import LORAKIT_JSON
from lorakit.formatting import listed
from lorakit.models.base_config import BaseConfig
from lorakit.models.config_fields import changed_fields, computing_fields
from lorakit.models.heads import classification_head, logits_layer
from lorakit.models.loading import Base, quiet
from lorakit.models.locating import Located, locate
from lorakit.models.sources import resolve
from lorakit.models.tokenizer import tokenizer_of
from lorakit.models.tree import base_modules, is_inside

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def open_tuned(
    base: BaseConfig, tuned: str | Path, train_modules: Sequence[str]
) -> WholeModel | FullFineTuned:
    """Open a fine-tuned model without reading its weights, or a folder of lorakit's full fine-tuning.

    Raises:
        AdapterFileError: It is an adapter, or the folder cannot be read.
        BaseModelError: The model does not exist, or its configuration cannot be read.
    """
    if not (Path(tuned) / LORAKIT_JSON).is_file():
        located = locate(resolve(str(tuned)), base.trust_remote_code, weights=False)
        source = dataclasses.replace(base, name=str(tuned), revision=located.source.revision)
        model = WholeModel(empty_model(source), source, located)
        heads = classification_head(model.empty)
        paths = [f".{p}" for p, _ in base_modules(model.empty) if is_inside(p, *heads)]
        if any(path.endswith(f".{entry}") for path in paths for entry in train_modules):
            model.head = type(model.empty).__name__, model.empty.config.num_labels
        return model
    stored = formats.read(tuned)
    if stored.layers or stored.modules:
        raise AdapterFileError(
            f"'{tuned}' is an adapter already ({type(stored.method).__name__}); a fully fine-tuned model was expected. "
            "lorakit compress changes the rank of an adapter."
        )
    class_name = stored.base and stored.base.class_name
    W = stored.trained.get(f"{logits_layer(empty_model(base, class_name))}.weight")
    return FullFineTuned(stored, (class_name, None if W is None else len(W)))


@dataclass
class WholeModel:
    """A model in a folder, on the hub or in a GGUF file."""

    empty: PreTrainedModel
    """The model on the meta device."""
    source: BaseConfig
    located: Located
    head: tuple[str | None, int | None] = (None, None)
    """Class and number of outputs of the head with which the base is loaded; None for those of the base."""
    loaded: Base | None = None
    """The model with its weights, if its files did not suffice."""

    def weights(self, base: Base, names: Sequence[str]) -> Weights:
        """Open the weights under the names of the model, which is loaded if its files lack one of `names`."""
        weights = base_weights.open_safetensors(self.source)
        weights = weights and weights.with_tied(tied_names(self.empty))
        if weights is None or any(name not in weights for name in names):
            self.loaded = load_float32(self.source)
            weights = base_weights.weights_of(self.loaded)
        return weights

    def differences(self, base: Base, weights: Weights) -> Iterator[str]:
        """Yield sentences about what an adapter of this base cannot hold: configuration, weights that one side has."""
        then, now = base.model.config, self.empty.config
        fields = changed_fields(computing_fields(then), computing_fields(now), training=False)
        if then.model_type != now.model_type:
            fields.append(f"model_type {then.model_type} -> {now.model_type}")
        if fields:
            yield (
                "An adapter cannot hold what differs in the configuration (base -> fine-tuned model): "
                f"{listed(sorted(fields))}."
            )
        saved = (now.architectures or [""])[0]
        if saved not in ("", type(self.empty).__name__):
            yield f"The fine-tuned model is a {saved}, which is read without its head."
        missing = _absent(self.empty, base_weights.weights_of(base), base.new_weights)
        if added := [name for name in missing if name in weights]:
            heads = classification_head(self.empty)
            new = [head for head in heads if any(is_inside(name, head) for name in added)]
            advice = f" To copy the new head, add {', '.join(new)} to train_modules." if new else ""
            yield (
                f"The base and the adapter lack {len(added)} weights of the fine-tuned model: {listed(added, 3)}."
                f"{advice}"
            )
        if lacking := _absent(base.model, weights, base.new_weights):
            yield (
                f"{len(lacking)} weights of the base were not compared, because the fine-tuned model's files lack them "
                f"or have other names for them: {listed(lacking, 3)}."
            )

    def load(self) -> PreTrainedModel:
        """Load the model in float32; raise a BaseModelError if it cannot be read or lacks weights."""
        loaded = self.loaded or load_float32(self.source)
        if new := loaded.new_weights:
            raise BaseModelError(
                f"The checkpoint of '{loaded.source.name}' lacks {len(new)} of the weights that "
                f"{type(loaded.model).__name__} needs ({listed(new, 3)}), so its predictions are random."
            )
        return loaded.model

    def tokenizer(self, base: Base) -> tuple[PreTrainedTokenizerBase | None, list[str]]:
        """Return the tokenizer, None if it has none or the base cannot use it, and a notice about the latter."""
        try:
            with quiet():
                found = tokenizer_of(self.located)
            if found is not None:
                require_known_tokens(base, found, self.located.source.name)
            return found, []
        except LorakitError as error:
            return None, [f"The adapter has no tokenizer of its own: {error}"]


def _absent(model: nn.Module, weights: Weights, new: Collection[str]) -> list[str]:
    """Return the names of the parameters that `weights` lack under all their names, and that are not `new`."""
    groups = (names for names, *_ in grouped_base_parameters(model) if names[0] not in new)
    return [names[0] for names in groups if not any(name in weights for name in names)]


@dataclass
class FullFineTuned:
    """A folder of lorakit's full fine-tuning. Weights that were not trained are those of the base."""

    stored: StoredAdapter
    head: tuple[str | None, int | None]
    base: Base | None = None

    def weights(self, base: Base, names: Sequence[str]) -> Weights:
        """Return the trained weights, and those of the base under the other names."""
        self.base = base
        trained = {name: tensor.detach for name, tensor in self.stored.trained.items()}
        others = {name: parameter.detach for name, parameter in base_parameters(base.model)}
        return Weights(base.source, others | trained).with_tied(tied_names(base.model))

    def differences(self, base: Base, weights: Weights) -> Iterator[str]:
        """Yield sentences about the base; raise a WrongBaseError if it is another one than the recorded one."""
        recorded, trained = self.stored.base, self.stored.trained
        if recorded is not None:
            live = formats.base_record(base.model, exclude=tuple(trained))
            yield from formats.compare(recorded, live)
        if all(name in trained for name, _ in base_parameters(base.model)):
            yield "All weights were trained, so whether training started from this base cannot be checked."

    def load(self) -> PreTrainedModel:
        """Copy the trained weights into the base."""
        assert self.base is not None
        with torch.no_grad():
            for name, tensor in self.stored.trained.items():
                self.base.model.get_parameter(name).copy_(tensor)
        return self.base.model
