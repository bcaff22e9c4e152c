"""Batches for a base model, on its device: padded, packed, or split into encoder and decoder sides."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from lorakit.compute.model_input import model_examples
from lorakit.data.batches import IGNORED, collate, round_up
from lorakit.data.packing import pack
from lorakit.models.loading import Base
from lorakit.tasks import Example, LanguageExample

Collate = Callable[[Sequence[Example]], dict[str, torch.Tensor]]
"""Makes a batch of examples, on the model's device."""

SHORT = 64
SHORT_STEP, PADDED_STEP, PACKED_STEP = 4, 8, 32
"""Widths of batches are multiples of these: for each shape a processor's library keeps kernels and memory,
which for every width there is come to hundreds of megabytes. The longer a row, the smaller the share that this
adds: those up to `SHORT` have the first step, longer ones the second, and packed rows, the longest, the third."""


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
