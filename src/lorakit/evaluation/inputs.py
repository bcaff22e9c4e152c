"""Group examples by prompt, and find the tokens to generate from."""

from __future__ import annotations

from collections.abc import Sequence

from lorakit.compute.batching import context_length, prompt_input
from lorakit.compute.model_input import start_length, virtual_tokens_of
from lorakit.evaluation.generate import require_room
from lorakit.models.loading import Base
from lorakit.tasks import Example, LanguageExample
from lorakit.tasks.language_modelling import cut_prompt, start_ids


def by_prompt(examples: Sequence[Example]) -> list[list[LanguageExample]]:
    """Group the examples of texts by the tokens to generate from, in order of appearance."""
    groups: dict[tuple[int, ...], list[LanguageExample]] = {}
    for example in examples:
        if isinstance(example, LanguageExample):
            groups.setdefault(tuple(example.generation_ids), []).append(example)
    return list(groups.values())


def prompts_of(
    base: Base, groups: Sequence[Sequence[LanguageExample]], new_tokens: int
) -> list[list[int]]:
    """Return the tokens to generate from for each group of examples with one prompt.

    Raises:
        DataError: A prompt leaves no room for the new tokens in the model's context. The message names its row.
    """
    prompts = [_prompt(base, group, new_tokens) for group in groups]
    origins = (group[0].origin for group in groups)
    require_room(base.model, zip(origins, prompts, strict=True), new_tokens)
    return prompts


def _prompt(base: Base, group: Sequence[LanguageExample], new_tokens: int) -> list[int]:
    """Return the tokens to generate from, cut to the model's context if `data.too_long` is truncate."""
    ids, encodes = group[0].generation_ids, base.model.config.is_encoder_decoder
    context = context_length(base.model)
    if context and group[0].may_be_cut:
        room = context - virtual_tokens_of(base.model).total - (1 if encodes else new_tokens)
        keep = start_length(ids, start_ids(base.text_tokenizer))
        ids = cut_prompt(ids, max(room, 1), keep)
    return prompt_input(base.model, base.text_tokenizer, ids)
