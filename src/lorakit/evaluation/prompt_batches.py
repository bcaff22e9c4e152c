"""Batches of prompts for `model.generate`: their padding, and which prompts can share one.

Some models read their padding, or mix the rows of a batch (RecurrentGemma, RWKV, DeepSeek-V4, the decoder of
ProphetNet). A prompt would then get another text in another batch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from lorakit.adapters.handle import own_handle
from lorakit.compute.agreement import largest_rounding, relative_difference
from lorakit.compute.batching import context_length
from lorakit.compute.mode import evaluating
from lorakit.data.batches import padded_rows
from lorakit.errors import is_out_of_memory
from lorakit.models.heads import input_embeddings

LENGTHS = (2, 7, 34, 34)
"""Tokens of the prompts of the trial. Padding changes the state of a recurrent model most after a prompt of few tokens;
models that compress keys need a longer prompt."""

NEW_TOKENS = 2
"""Tokens that the trial generates after each prompt."""

LARGEST_OF_NEIGHBOURS = 0.02
"""Largest relative difference between the scores beside other prompts and padding of the same lengths, which a model
that ignores these computes by the same operations: 0 was measured in all dtypes, and 0.09 and more for others."""
LARGEST_IN_16_BITS = 0.5
"""Largest relative difference in 16 bits between scores alone and in a batch. There, rounding sends some tokens of a
mixture to other experts (0.14 was measured). Models that read padding in every batch alike differ by 0.87 and more."""

EQUAL_LENGTHS = (
    "only prompts of equal length share a batch, because this model's scores change with padding"
)


@dataclass(frozen=True)
class BatchRule:
    """Which prompts can share a batch, so that each gets the scores that it has alone."""

    can_share: Callable[[int, int], bool]
    """Whether prompts of these two lengths can."""
    notice: str | None = None
    """Why not all can, as the user reads it."""


def batch_rule(model: PreTrainedModel, notify: Callable[[str], Any] = lambda _: None) -> BatchRule:
    """Return the rule of a model. The first call computes a few tokens with the base alone, and is remembered.

    Args:
        model: A model that generates text.
        notify: Called with the notice of the rule, if it has one, at the first call for this model.
    """
    if model not in _RULES:
        _RULES[model] = rule = _trial(model)
        if rule.notice:
            notify(rule.notice)
    return _RULES[model]


_RULES: WeakKeyDictionary[PreTrainedModel, BatchRule] = WeakKeyDictionary()


def _trial(model: PreTrainedModel) -> BatchRule:
    """Compute prompts alone, beside others with padding, and beside one of equal length, and compare their scores."""
    generator = torch.Generator().manual_seed(0)
    context = context_length(model) or max(LENGTHS) + NEW_TOKENS
    lengths = [max(min(length, context - NEW_TOKENS), 1) for length in LENGTHS]
    short, medium, *long = (_random(model, n, generator).tolist() for n in lengths)

    def scores(*prompts: list[int]) -> Tensor:
        return _scores(model, [*prompts], generator)

    def agree(found: Tensor, expected: Tensor, largest: float) -> bool:
        rows = zip(found, expected, strict=True)
        return all(relative_difference(*row) <= largest for row in rows)

    handle, rounding = own_handle(model), _rounding(model)
    base = nullcontext() if handle is None or handle.merged else handle.disabled()
    try:
        with base, evaluating(model):
            alone = torch.cat([scores(short), scores(medium)])
            if not alone.isfinite().all() or not alone.any():
                return BatchRule(lambda *_: True)  # the model's own error is clearer
            # Each call draws another padding.
            first, second = (scores(short, medium, other)[:2] for other in long)
            if agree(first, second, LARGEST_OF_NEIGHBOURS) and agree(first, alone, rounding):
                return BatchRule(lambda *_: True)
            equal = scores(medium, long[0][: len(medium)])
            if agree(equal[:1], alone[1:], rounding):
                return BatchRule(operator.eq, EQUAL_LENGTHS)
            reason = "this model's scores change with the other rows of a batch"
    except Exception as error:  # of any model; a batch of one shows the user its own error
        if is_out_of_memory(error):
            raise
        reason = f"a trial batch failed ({type(error).__name__}: {error})"
    return BatchRule(lambda *_: False, f"each prompt is computed alone, because {reason}")


def _rounding(model: PreTrainedModel) -> float:
    """Return the largest relative difference that rounding makes in the dtype that the model computes in."""
    kind = model.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype
    return largest_rounding(dtype, LARGEST_IN_16_BITS)


def _random(model: PreTrainedModel, count: int, generator: torch.Generator) -> Tensor:
    """Return random tokens that the model can embed."""
    known = getattr(input_embeddings(model), "num_embeddings", None)
    return torch.randint(
        known or model.config.get_text_config().vocab_size, (count,), generator=generator
    )


def _scores(model: PreTrainedModel, prompts: list[list[int]], generator: torch.Generator) -> Tensor:
    """Return the scores (N, `NEW_TOKENS`, V) of the next tokens of N prompts, padded with random tokens."""
    own = model.generation_config
    assert own is not None  # every model with generate() has one
    settings = GenerationConfig(
        max_new_tokens=NEW_TOKENS,
        pad_token_id=0,
        bos_token_id=own.bos_token_id,
        decoder_start_token_id=own.decoder_start_token_id,
        output_logits=True,
        return_dict_in_generate=True,
    )
    inputs = padded(model, prompts, 0)
    is_padding = inputs["attention_mask"] == 0
    padding = _random(model, int(is_padding.sum()), generator)
    inputs["input_ids"][is_padding] = padding.to(model.device)
    with only_settings(model, settings):
        outputs = model.generate(  # type: ignore[operator]
            **inputs,
            generation_config=settings,
            prefix_allowed_tokens_fn=lambda *_: [0],  # one token in all batches
        )
    return torch.stack(outputs.logits, 1)


@contextmanager
def only_settings(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Keep `generate` from filling unset values from the model's own configuration, such as a repetition penalty."""
    previous = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = previous


def padded(model: PreTrainedModel, prompts: list[list[int]], pad: int) -> dict[str, Tensor]:
    """Return input_ids and attention_mask (B, longest prompt), padded where the model needs it.

    A decoder continues the last token, so its padding is on the left. An encoder such as BART's counts positions from
    the first entry, so its padding is on the right.
    """
    left = not model.config.is_encoder_decoder
    mask = [[1] * len(prompt) for prompt in prompts]
    return {
        "input_ids": padded_rows(prompts, pad, left=left).to(model.device),
        "attention_mask": padded_rows(mask, 0, left=left).to(model.device),
    }
