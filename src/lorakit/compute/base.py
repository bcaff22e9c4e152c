"""The base model that a configuration and its data ask for: the right head, on the right device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import AutoConfig, PreTrainedModel

from lorakit.compute.model_input import model_examples, virtual_tokens_of
from lorakit.compute.objective import IGNORED
from lorakit.data import DataTask
from lorakit.data.batches import collate, round_up
from lorakit.data.packing import pack
from lorakit.errors import BaseModelError, DataError
from lorakit.models.base_config import BaseConfig
from lorakit.models.devices import pick_device
from lorakit.models.loading import Base, ModelHead, load_base
from lorakit.models.sources import resolve
from lorakit.tasks import Example, LanguageExample

Collate = Callable[[Sequence[Example]], dict[str, torch.Tensor]]
"""Makes a batch of examples, on the model's device."""

SHORT = 64
SHORT_STEP, PADDED_STEP, PACKED_STEP = 4, 8, 32
"""Widths of batches are multiples of these: for each shape a processor's library keeps kernels and memory,
which for every width there is come to hundreds of megabytes. The longer a row, the smaller the share that this
adds: those up to `SHORT` have the first step, longer ones the second, and packed rows, the longest, the third."""


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


def context_length(model: PreTrainedModel) -> int | None:
    """Return the longest input that the model has positions for; None where it does not say."""
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    # T5 has n_positions too, at which its relative positions do not end.
    if context is None and not config.is_encoder_decoder:
        context = getattr(config, "n_positions", None)
    if context is None or not getattr(config, "position_biased_input", True):
        return None  # DeBERTa's positions are relative
    for name, module in model.named_modules():  # RoBERTa's positions begin after its padding index
        if (
            name.endswith("position_embeddings")
            and getattr(module, "padding_idx", None) is not None
        ):
            return context - module.padding_idx - 1  # type: ignore[operator]
    return context


def collator(base: Base, *, packed: bool = False) -> Collate:
    """Return what makes batches for `base`, on its device: padded, packed, or split for an encoder-decoder."""
    model, tokenizer = base.model, base.tokenizer
    assert tokenizer is not None  # open_base refuses a base without
    pad = int(tokenizer.pad_token_id or 0)  # type: ignore[arg-type]
    encodes = model.config.is_encoder_decoder
    context = context_length(model)

    def make(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        examples = model_examples(base, examples)
        language = [e for e in examples if isinstance(e, LanguageExample)]
        splits = encodes and language
        if packed:
            batch = pack(language, pad, step=PACKED_STEP)
        elif splits:
            batch = _encoder_decoder_batch(base, language, pad)
        else:
            longest = max(map(len, examples))
            step = SHORT_STEP if longest <= SHORT else PADDED_STEP
            fits = context is None or round_up(longest, step) <= context
            batch = collate(examples, pad, step=step if fits else 1)
        return {name: tensor.to(model.device) for name, tensor in batch.items()}

    return make


def encoder_input(base: Base, example: LanguageExample) -> list[int]:
    """Return the tokens of a prompt as an encoder takes them: closed by the end of sequence."""
    assert base.tokenizer is not None
    return [*example.prompt_ids, int(base.tokenizer.eos_token_id)]  # type: ignore[arg-type]


def _encoder_decoder_batch(
    base: Base, examples: Sequence[LanguageExample], pad: int
) -> dict[str, torch.Tensor]:
    # A decoder that generation starts with a forced token (BART) has to see it there in training too.
    generation = getattr(base.model, "generation_config", None)
    forced = getattr(generation, "forced_bos_token_id", None)
    start = [] if forced is None else [int(forced)]
    inputs = [encoder_input(base, e) for e in examples]
    targets = [[*start, *e.input_ids[e.prompt_length :]] for e in examples]
    width, length = max(map(len, inputs)), max(map(len, targets))
    return {
        "input_ids": torch.tensor([[*ids, *[pad] * (width - len(ids))] for ids in inputs]),
        "attention_mask": torch.tensor(
            [[*[1] * len(ids), *[0] * (width - len(ids))] for ids in inputs]
        ),
        "labels": torch.tensor([[*ids, *[IGNORED] * (length - len(ids))] for ids in targets]),
    }


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
