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

from lorakit.adapters import handle_of
from lorakit.compute.agreement import largest_rounding, relative_difference
from lorakit.compute.mode import evaluating
from lorakit.data.batches import padded_rows

LENGTHS = (2, 7, 34)
"""Tokens of the prompts of the trial. Padding changes the state of a recurrent model most after a prompt of few tokens;
models that compress keys need a longer prompt."""

LARGEST_OF_PADDING = 0.02
"""Largest relative difference between the scores under two paddings, which a model that ignores them computes by the
same operations: 0 was measured in all dtypes, and 0.09 and more for models that read padding."""

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
    """Compute prompts alone, padded, and beside one of equal length, and compare their scores."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    short, medium, long = (
        torch.randint(vocabulary, (n,), generator=generator).tolist() for n in LENGTHS
    )

    def scores(*prompts: list[int]) -> Tensor:
        return _scores(model, [*prompts], generator)

    def agree(found: Tensor, expected: Tensor, largest: float) -> bool:
        rows = zip(found, expected, strict=True)
        return all(relative_difference(*row) <= largest for row in rows)

    handle, rounding = handle_of(model), largest_rounding(model.dtype)
    base = nullcontext() if handle is None or handle.merged else handle.disabled()
    try:
        with base, evaluating(model):
            alone = torch.cat([scores(short), scores(medium)])
            # Each call draws another padding.
            first, second = (scores(short, medium, long)[:2] for _ in range(2))
            if agree(first, second, LARGEST_OF_PADDING) and agree(first, alone, rounding):
                return BatchRule(lambda *_: True)
            if agree(scores(medium, long[: len(medium)])[:1], alone[1:], rounding):
                return BatchRule(operator.eq, EQUAL_LENGTHS)
            reason = "this model's scores change with the other rows of a batch"
    except (
        Exception
    ) as error:  # any model of any library; a batch of one shows the user its own error
        reason = f"a trial batch failed ({type(error).__name__}: {error})"
    return BatchRule(lambda *_: False, f"each prompt is computed alone, because {reason}")


def _scores(model: PreTrainedModel, prompts: list[list[int]], generator: torch.Generator) -> Tensor:
    """Return the scores (N, 2, V) of the next two tokens of N prompts, padded with random tokens."""
    own = model.generation_config
    assert own is not None  # every model with generate() has one
    settings = GenerationConfig(
        max_new_tokens=2,
        pad_token_id=0,
        bos_token_id=own.bos_token_id,
        decoder_start_token_id=own.decoder_start_token_id,
        output_logits=True,
        return_dict_in_generate=True,
    )
    inputs = padded(model, prompts, 0)
    is_padding = inputs["attention_mask"] == 0
    count, vocabulary = int(is_padding.sum()), model.config.get_text_config().vocab_size
    padding = torch.randint(vocabulary, (count,), generator=generator)
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
