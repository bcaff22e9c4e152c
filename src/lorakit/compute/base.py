"""Loading of a base model with the head of a task, and the check of context lengths."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from lorakit.compute.batching import context_length, require_embeddings
from lorakit.compute.memory import free_memory
from lorakit.compute.model_input import virtual_tokens_of
from lorakit.data import DataTask
from lorakit.errors import BaseModelError, DataError
from lorakit.formatting import listed
from lorakit.models.base_config import BaseConfig
from lorakit.models.base_shape import shape_of
from lorakit.models.devices import pick_device
from lorakit.models.heads import logits_layer
from lorakit.models.loading import Base, load_base, load_tokenizer
from lorakit.models.model_classes import ModelHead
from lorakit.models.processor import limit_processor
from lorakit.models.tree import is_inside
from lorakit.tasks import Example, LanguageExample

OTHER_CLASSES = "The head of the checkpoint has the classes"
"""Beginning of the notice about a head that was trained for other classes."""


def read_text_tokenizer(config: BaseConfig) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a base without its model, so that errors of the data come before the load.

    Raises:
        BaseModelError: The base does not exist, it has no tokenizer, or its tokenizer cannot be read.
    """
    return load_tokenizer(
        config.name, revision=config.revision, trust_remote_code=config.trust_remote_code
    )


def open_base(
    config: BaseConfig,
    task: DataTask,
    *,
    seed: int = 0,
    num_labels: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Base:
    """Load the base with a head for `task`, and move it to the configured device.

    Args:
        config: The base.
        task: Its labels name the outputs of the head.
        seed: Seed of a head that the checkpoint lacks.
        num_labels: Fewest outputs of a head for classes. Those beyond the labels of `task` have transformers' names.
        tokenizer: The base's tokenizer, if `read_text_tokenizer` has read it before.

    Raises:
        BaseModelError: The base cannot be read, does not support such a head, or has no tokenizer.
        ConfigurationError: No model is named, or the device does not exist.
    """
    free_memory()  # an adapted base has reference cycles, and this one may follow another
    device = pick_device(config.device)
    if device.type == "cpu":
        limit_processor()
    count = max(len(task.labels), num_labels or 0)
    base = load_base(
        config.name,
        task=model_head(task, lambda: is_encoder_decoder(config)),
        num_labels=count or None,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
        revision=config.revision,
        device=device,
        seed=seed,
        tokenizer=tokenizer,
    )
    _ = base.text_tokenizer  # raises an error if there is none
    base.model.to(device)  # type: ignore[arg-type]
    if task.labels:  # a merged model, or one that transformers saves, then names its predictions
        names = [*task.labels, *(f"LABEL_{i}" for i in range(len(task.labels), count))]
        _compare_classes(base, names)
        base.model.config.id2label = dict(enumerate(names))
        base.model.config.label2id = {label: i for i, label in enumerate(names)}
    return base


def _compare_classes(base: Base, names: Sequence[str]) -> None:
    """Add a notice if the checkpoint's head names other classes, or these in another order."""
    head = logits_layer(base.model)
    is_new = head is None or any(is_inside(name, head) for name in base.new_weights)
    own = [str(name) for _, name in sorted((base.model.config.id2label or {}).items())]
    is_named = not all(re.fullmatch(r"LABEL_\d+", name) for name in own)
    are_indices = [*names] == [str(i) for i in range(len(names))]  # of the head's own classes
    if is_new or not is_named or are_indices:
        return
    if [_plain(name) for name in own] != [_plain(name) for name in names]:
        base.notices.append(
            f"{OTHER_CLASSES} {listed(own)}. The data's are {listed(names)}, in this order, so the head's scores are "
            "wrong until it is trained."
        )


def _plain(name: str) -> str:
    """Return a class name without differences of case and punctuation."""
    return re.sub(r"[\W_]+", " ", name).strip().lower() or name


def check_context(base: Base, examples: Sequence[Example]) -> None:
    """Reject examples that are longer than the model's context, or than either context of an encoder-decoder.

    Reject also tokens without an embedding. An encoder-decoder reads the prompt in its encoder, so all targets must be
    in the completion.

    Raises:
        DataError: An example is too long, or has targets in the prompt or an unknown token.
    """
    require_embeddings(base.model, ((e.origin, e.input_ids) for e in examples))
    context = context_length(base.model)
    if base.model.config.is_encoder_decoder:
        _check_targets(base, examples)
        if context is not None:
            _check_sides(base, examples, context)
        return
    if context is None or not examples:
        return
    longest = max(examples, key=len)
    virtual = virtual_tokens_of(base.model).total
    if len(longest) + virtual <= context:
        return
    and_virtual = f" and the adapter's {virtual} virtual ones" if virtual else ""
    raise DataError(
        f"{longest.origin} has {len(longest):,} tokens{and_virtual}, and the context of '{base.source.name}' is "
        f"{context:,}. Set data.max_length to {context - virtual} and data.too_long to skip or truncate."
    )


def _check_targets(base: Base, examples: Sequence[Example]) -> None:
    """Reject plain text, and conversations with targets before the last turn."""
    found = f"but '{base.source.name}' is an encoder-decoder, which trains the text after a prompt only."
    for example in examples:
        if not isinstance(example, LanguageExample):
            continue
        if not example.completion:
            raise DataError(
                f"{example.origin} is plain text, {found} Use rows of prompt and completion, or a decoder as base."
            )
        prompt = example.loss_mask[: example.prompt_length]
        while prompt and prompt[-1]:  # some templates mark the header of the last turn
            prompt.pop()
        if any(prompt):
            raise DataError(
                f"{example.origin} has loss on several assistant turns, {found} Set weight 0 on all assistant turns "
                "but the last, or use a decoder as base."
            )


def _check_sides(base: Base, examples: Sequence[Example], context: int) -> None:
    """Reject prompts longer than the encoder's context and completions longer than the decoder's."""
    for example in examples:
        if not isinstance(example, LanguageExample):
            sides = {"tokens": len(example)}
        else:  # the encoder's end token and the decoder's start token count too
            prompt = example.prompt_length
            sides = {"prompt tokens": prompt + 1, "completion tokens": len(example) - prompt + 1}
        for unit, count in sides.items():
            if count > context:
                raise DataError(
                    f"{example.origin} has {count:,} {unit}, but the encoder and the decoder of '{base.source.name}' "
                    f"have a context of {context:,} each. Shorten it, or set data.max_length to {context - 1} and "
                    "data.too_long to skip or truncate."
                )


def model_head(task: DataTask, encodes: Callable[[], bool]) -> ModelHead:
    """Return the head that a model needs for `task`; only text generation has to know the architecture."""
    if task.kind == "classification":
        return "sequence-classification"
    if task.kind == "regression":
        return "regression"
    return "seq2seq-lm" if encodes() else "causal-lm"


def is_encoder_decoder(config: BaseConfig) -> bool:
    """Return whether the base has an encoder and a decoder, by its configuration; False if that cannot be read."""
    try:
        return shape_of(config).is_encoder_decoder
    except BaseModelError:  # loading the model raises a better message
        return False
