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

    If `data.too_long` is truncate, prompts are cut to the model's context without the new tokens.

    Raises:
        DataError: A prompt leaves no room for the new tokens in the model's context. The message names its row.
    """
    model, tokenizer = base.model, base.text_tokenizer
    reserved = 1 if model.config.is_encoder_decoder else new_tokens
    room = (context_length(model) or 0) - virtual_tokens_of(model).total - reserved
    prompts = []
    for group in groups:
        ids = group[0].generation_ids
        if group[0].may_be_cut and 0 < room < len(ids):
            ids = cut_prompt(ids, room, start_length(ids, start_ids(tokenizer)))
        prompts.append(prompt_input(model, tokenizer, ids))
    origins = (group[0].origin for group in groups)
    require_room(model, zip(origins, prompts, strict=True), new_tokens)
    return prompts
