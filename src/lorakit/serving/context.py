"""How many tokens a request may have on a model."""

from __future__ import annotations

from transformers import PreTrainedModel

from lorakit.compute.batching import context_length


def context_of(model: PreTrainedModel) -> tuple[int | None, str | None]:
    """Return the longest request in tokens, and why it is shorter than the model's own context.

    The first is None if the model states no context, the second if there is nothing to say.

    transformers rotates all rows of a forward pass with LongRoPE's long factors as soon as one position exceeds the
    length of pretraining, also keys that later requests reuse. Up to this length only the short factors are used.
    """
    stated, short = context_length(model), _pretraining_length(model)
    if stated is None or short is None or short >= stated:
        return stated, None
    return short, (
        f"requests have at most {short:,} of the {stated:,} tokens of the context: beyond them LongRoPE computes the "
        "other requests of a batch differently"
    )


def _pretraining_length(model: PreTrainedModel) -> int | None:
    """Return the tokens for which LongRoPE uses its short factors; None for other positions."""
    own = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    entries = [own, *(entry for entry in own.values() if isinstance(entry, dict))]  # by layer type
    lengths = [
        int(entry["original_max_position_embeddings"])
        for entry in entries
        if entry.get("rope_type") == "longrope"
    ]
    return min(lengths, default=None)
