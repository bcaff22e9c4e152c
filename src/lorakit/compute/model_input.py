"""Insertion of the active adapter's virtual tokens into examples and prompts.

Data sets have examples without virtual tokens, so that all methods can use the same data. Batches and prompts insert
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorakit.adapters.handle import own_handle
from lorakit.methods.virtual_tokens import VirtualTokens
from lorakit.models.loading import Base
from lorakit.tasks import Example, LabelledExample, LanguageExample
from lorakit.tasks.language_modelling import start_ids

E = TypeVar("E", bound=Example)


def virtual_tokens_of(model: PreTrainedModel) -> VirtualTokens:
    """Return the virtual tokens that the active adapter adds to each sequence; most methods add none."""
    handle = own_handle(model)
    return VirtualTokens() if handle is None else handle.virtual_tokens


def model_examples(base: Base, examples: Sequence[E]) -> Sequence[E]:
    """Return the examples with the virtual tokens of the active adapter."""
    tokens = virtual_tokens_of(base.model)
    if not tokens.total:
        return examples
    start = start_ids(base.text_tokenizer)
    return [place(example, tokens, start) for example in examples]


def model_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> list[list[int]]:
    """Return the token ids of prompts, with the virtual tokens of the active adapter."""
    tokens = virtual_tokens_of(model)
    if not tokens.total:
        return prompts
    start = start_ids(tokenizer)
    return [tokens.place(prompt, keep=start_length(prompt, start)) for prompt in prompts]


def place(example: E, tokens: VirtualTokens, start: Sequence[int]) -> E:
    """Return a copy of `example` with the prefix before its prompt and the infix after it; neither is a target.

    The prefix goes after `start`, the special tokens at the start of a text (bos, [CLS]), since models expect them at
    position 0. The input of a classifier is all prompt, so it ends with the infix.
    """
    lengths = {"keep": start_length(example.input_ids, start)}  # arguments of VirtualTokens.place
    if isinstance(example, LanguageExample):
        lengths["prompt"] = max(example.prompt_length, lengths["keep"])
        return replace(
            example,
            input_ids=tokens.place(example.input_ids, **lengths),
            loss_mask=tokens.place(example.loss_mask, **lengths, fill=False),
            prompt_length=lengths["prompt"] + tokens.total,
        )
    ids = tokens.place(example.input_ids, **lengths)
    if isinstance(example, LabelledExample) and example.token_type_ids is not None:
        types = tokens.place(example.token_type_ids, **lengths, fill=0)
        return replace(example, input_ids=ids, token_type_ids=types)
    return replace(example, input_ids=ids)


def start_length(ids: Sequence[int], start: Sequence[int]) -> int:
    """Return the number of special tokens at the start of `ids`; 0 unless `ids` begin with all of them."""
    return len(start) if list(ids[: len(start)]) == list(start) else 0
