"""How many tokens a request may have on a model."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorakit.compute.batching import context_length, pretraining_length

UNSTATED = 2048
"""Context of a model that states none, and whose tokenizer has no length either."""

LONGEST = 2**20
"""Largest length of a tokenizer that is taken for a context. Without one, transformers reports 10^30."""


def context_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt_tokens: int | None = None
) -> tuple[int, str | None]:
    """Return the longest request in tokens, and a notice if that is not the model's own context.

    Relative positions have no limit, but the memory of attention grows with the square of the length, and one request
    must not exhaust it.

    transformers rotates all rows of a forward pass with LongRoPE's long factors as soon as one position exceeds the
    length of pretraining, also keys that later requests reuse. Up to this length only the short factors are used.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        prompt_tokens: Length of a prompt that a model without a stated context must accept.
    """
    stated, short = context_length(model), pretraining_length(model)
    if stated is None:
        own = tokenizer.model_max_length
        context = max(own if own <= LONGEST else UNSTATED, (prompt_tokens or 0) + 1)
        return context, (
            f"the model states no context, so requests have at most {context:,} tokens. --max_prompt_tokens raises this"
        )
    if short is None or short >= stated:
        return stated, None
    return short, (
        f"requests have at most {short:,} of the {stated:,} tokens of the context: beyond them LongRoPE computes the "
        "other requests of a batch differently"
    )
