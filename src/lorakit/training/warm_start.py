"""Start training from an existing adapter, also one of another task.

The paper starts MRPC, RTE and STS-B from the adapter of MNLI. The official code drops the head's last layer, whose
shape differs (3 classes against 2 or 1), and loads the other layers, for example RoBERTa's `classifier.dense`.
"""

from __future__ import annotations

from lorakit.adapters import Adapters, formats
from lorakit.adapters.loading import load
from lorakit.errors import ConfigurationError
from lorakit.methods import Method
from lorakit.methods.combined import lora_of
from lorakit.models.heads import classification_head
from lorakit.models.loading import Base
from lorakit.models.tree import is_inside
from lorakit.training.config import TrainConfig


def method_of(config: TrainConfig) -> Method:
    """Return the method of a run: the configured one, or that of the adapter from which it starts.

    Raises:
        ConfigurationError: `optimizer.lr_ratio` is set, and the adapter is not LoRA.
        LorakitError: The adapter cannot be read.
    """
    if config.from_adapter is None:
        return config.chosen_method
    method = formats.read(config.from_adapter).method
    if config.optimizer.lr_ratio != 1 and lora_of(method) is None:
        raise ConfigurationError(
            f"optimizer.lr_ratio is {config.optimizer.lr_ratio}, which applies only to lora, and {config.from_adapter} "
            f"is {type(method).__name__}. Set it to 1."
        )
    return method


def warm_start(base: Base, path: str, *, name: str) -> Adapters:
    """Load the adapter at `path` on `base` for training; add a notice about the weights that start anew.

    These are the parts of the head that the adapter has in another shape, and weights that neither the base nor the
    adapter has, such as the head of a classifier whose adapter was trained on a language model.

    Raises:
        LorakitError: The adapter cannot be read, or more than its head does not fit the base.
    """
    stored = formats.read(path)
    heads = classification_head(base.model)
    new, loaded = {}, []
    for parameter, tensor in base.model.named_parameters():
        old = stored.trained.get(parameter, stored.base_copies.get(parameter))
        in_head = is_inside(parameter, *heads)
        if old is None:
            if parameter in base.new_weights:
                new[parameter] = f"{parameter} {tuple(tensor.shape)}"
        elif in_head and old.shape != tensor.shape:
            new[parameter] = f"{parameter} {tuple(old.shape)} -> {tuple(tensor.shape)}"
        elif in_head:
            loaded.append(parameter)
        if parameter in new:
            stored.trained[parameter] = tensor.detach().clone()
            stored.base_copies.pop(parameter, None)
    adapters = load(base.model, stored, name=name, trainable=True, tokenizer=base.tokenizer)
    if new:
        parts = f"{', '.join(sorted(loaded))} and the adapter" if loaded else "the adapter"
        base.notices.append(
            f"warm start from {path}: the adapter lacks these weights or has them in another shape, so they start anew "
            f"and are trained: {', '.join(new.values())}; loaded {parts}"
        )
    return adapters
