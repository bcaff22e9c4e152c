"""Choose the engine for a model."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorakit.errors import BaseModelError
from lorakit.serving.batched import BatchedEngine
from lorakit.serving.continuous import ContinuousEngine
from lorakit.serving.paged_attention import UnsupportedModelError
from lorakit.serving.threaded_engine import ThreadedEngine


def engine_for(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    cache_bytes: int = 2**30,
    **limits: Any,
) -> ThreadedEngine:
    """Return an engine for a model: continuous batching where the model can be computed so, else whole batches.

    The engine is not started. Its `notice` says why it is the second.

    Args:
        model: A model that generates text.
        tokenizer: Its tokenizer.
        cache_bytes: Memory for keys and values, in continuous batching.
        limits: The settings of both engines: `running`, `queue` and `prompt_tokens`.

    Raises:
        BaseModelError: The model generates no text.
    """
    if not model.can_generate():
        raise BaseModelError(
            f"A {type(model).__name__} cannot generate text. Serve a base with a language-modelling head, or only "
            "adapters for classification."
        )
    try:
        return ContinuousEngine(model, tokenizer, cache_bytes=cache_bytes, **limits)
    except UnsupportedModelError as reason:
        notice = f"requests are computed in batches that end together, not by continuous batching: {reason}"
        return BatchedEngine(model, tokenizer, notice=notice, **limits)
