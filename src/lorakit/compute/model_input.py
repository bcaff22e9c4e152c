"""Examples as the model reads them: with the virtual tokens of the active adapter's method.

Data sets hold examples without virtual tokens, so that the same data serves every method. They are inserted when a
batch or a prompt is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorakit.adapters import handle_of
from lorakit.methods.virtual_tokens import VirtualTokens
from lorakit.models.loading import Base
from lorakit.tasks import Example, LabelledExample, LanguageExample
from lorakit.tasks.language_modelling import start_ids

E = TypeVar("E", bound=Example)


def virtual_tokens_of(model: PreTrainedModel) -> VirtualTokens:
    """Return the virtual tokens that the active adapter adds to each sequence; for most methods none."""
    handle = handle_of(model)
    return VirtualTokens() if handle is None else handle.virtual_tokens


def model_examples(base: Base, examples: Sequence[E]) -> Sequence[E]:
    """Return the examples with the virtual tokens of the active adapter."""
    tokens = virtual_tokens_of(base.model)
    if not tokens.total:
        return examples
    assert base.tokenizer is not None  # open_base rejects a base without one
    start = start_ids(base.tokenizer)
    return [place(example, tokens, start) for example in examples]


def model_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> list[list[int]]:
    """Return the ids of prompts with the virtual tokens of the active adapter."""
    tokens = virtual_tokens_of(model)
    if not tokens.total:
        return prompts
    start = start_ids(tokenizer)
    return [place_in_prompt(prompt, tokens, start) for prompt in prompts]


def place(example: E, tokens: VirtualTokens, start: Sequence[int]) -> E:
    """Return the example with the prefix before its prompt and the infix after it; neither is a target.

    What a classifier reads is all prompt: the infix ends it.

    Args:
        example: Without virtual tokens; it is not changed.
        tokens: How many of them.
        start: The special tokens that the tokenizer puts first (bos, [CLS]): the prefix stands after them, since
            models look for them at position 0.
    """
    where = {"keep": _kept(example.input_ids, start)}
    if isinstance(example, LanguageExample):
        where["prompt"] = max(example.prompt_length, where["keep"])
        return replace(
            example,
            input_ids=tokens.place(example.input_ids, **where),
            loss_mask=tokens.place(example.loss_mask, **where, fill=False),
            prompt_length=where["prompt"] + tokens.total,
        )
    ids = tokens.place(example.input_ids, **where)
    if isinstance(example, LabelledExample) and example.token_type_ids is not None:
        types = tokens.place(example.token_type_ids, **where, fill=0)
        return replace(example, input_ids=ids, token_type_ids=types)
    return replace(example, input_ids=ids)


def place_in_prompt(ids: Sequence[int], tokens: VirtualTokens, start: Sequence[int]) -> list[int]:
    """Return the ids of a prompt with prefix and infix, as `place` puts them into an example."""
    return tokens.place(ids, keep=_kept(ids, start))


def _kept(ids: Sequence[int], start: Sequence[int]) -> int:
    return len(start) if list(ids[: len(start)]) == list(start) else 0
