"""The base model that a configuration and its data ask for: the right head, on the right device."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import AutoConfig

from lorakit.compute.batching import context_length
from lorakit.compute.model_input import virtual_tokens_of
from lorakit.data import DataTask
from lorakit.errors import BaseModelError, DataError
from lorakit.models.base_config import BaseConfig
from lorakit.models.devices import pick_device
from lorakit.models.loading import Base, ModelHead, load_base
from lorakit.models.sources import resolve
from lorakit.tasks import Example, LanguageExample


def open_base(config: BaseConfig, task: DataTask, *, seed: int = 0) -> Base:
    """Load the base with a head for `task`, and move it to the configured device.

    Raises:
        BaseModelError: It cannot be read, has no such head, or comes without a tokenizer.
        ConfigurationError: The device is not there.
    """
    device = pick_device(config.device)
    base = load_base(
        config.name,
        task=_model_task(config, task),
        num_labels=len(task.labels) or None,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
        revision=config.revision,
        device=device,
        seed=seed,
    )
    if base.tokenizer is None:
        raise BaseModelError(
            f"'{base.source.name}' has no tokenizer, without which text cannot be read. Name a base that has "
            "one, or save the tokenizer into its folder."
        )
    base.model.to(device)  # type: ignore[arg-type]
    return base


def check_context(base: Base, examples: Sequence[Example]) -> None:
    """Refuse examples that are longer than the model's context, on either side of an encoder-decoder.

    Raises:
        DataError: Names the longest, its length, the context and what to set.
    """
    context = context_length(base.model)
    if context is None or not examples:
        return
    if base.model.config.is_encoder_decoder:
        _check_sides(base, examples, context)
        return
    longest = max(examples, key=len)
    virtual = virtual_tokens_of(base.model).total
    if len(longest) + virtual <= context:
        return
    beside = f" and the adapter's {virtual} virtual ones" if virtual else ""
    raise DataError(
        f"{longest.origin} has {len(longest):,} tokens{beside}, and the context of '{base.source.name}' is "
        f"{context:,}. Set data.max_length to {context - virtual} and data.too_long to skip or truncate."
    )


def _check_sides(base: Base, examples: Sequence[Example], context: int) -> None:
    """Refuse prompts and completions that are longer than the encoder's and the decoder's context."""
    for example in examples:
        if not isinstance(example, LanguageExample):
            sides = {"tokens": len(example)}
        else:  # each is closed or begun by a token of its own
            prompt = example.prompt_length
            sides = {"prompt tokens": prompt + 1, "completion tokens": len(example) - prompt + 1}
        for what, count in sides.items():
            if count > context:
                raise DataError(
                    f"{example.origin} has {count:,} {what}, and each side of '{base.source.name}' has a context of "
                    f"{context:,}. Shorten it, or set data.max_length to {context - 1} and data.too_long to skip or "
                    "truncate."
                )


def _model_task(config: BaseConfig, task: DataTask) -> ModelHead:
    if task.kind == "classification":
        return "sequence-classification"
    if task.kind == "regression":
        return "regression"
    return "seq2seq-lm" if _is_encoder_decoder(config) else "causal-lm"


def _is_encoder_decoder(config: BaseConfig) -> bool:
    source = resolve(config.name, revision=config.revision)
    if source.kind == "gguf":
        return False
    try:
        found = AutoConfig.from_pretrained(
            source.path_or_id,
            revision=source.revision,
            trust_remote_code=config.trust_remote_code,
        )
    except Exception:  # whatever is wrong with it, loading the model says it better
        return False
    return bool(getattr(found, "is_encoder_decoder", False))
