"""Where virtual tokens stand in an example: the one place that puts them into the ids of lorakit's own data.

Examples are kept without them, so that the same data serves every method; they come in when a batch or a prompt is
made for a model whose active adapter takes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from lorakit.methods.virtual_tokens import VirtualTokens
from lorakit.tasks import Example, LabelledExample, LanguageExample

E = TypeVar("E", bound=Example)


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
