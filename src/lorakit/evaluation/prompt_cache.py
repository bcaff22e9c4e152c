"""Keys and values of a conversation, reused where the next prompt starts with the same tokens."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.generation.utils import ALL_CACHE_NAMES

from lorakit.adapters.handle import own_handle
from lorakit.tasks.language_modelling import common_length

ARGUMENT = ALL_CACHE_NAMES[0]
"""The argument of `model.generate` for a cache; its name differs between versions of transformers."""


def empty_cache(model: PreTrainedModel) -> DynamicCache | None:
    """Return a cache that `model.generate` can be given; None if the model takes none, or one of another kind."""
    if model.config.is_encoder_decoder or not model._supports_default_dynamic_cache():  # type: ignore[operator]
        return None
    if ARGUMENT not in inspect.signature(model.forward).parameters:
        return None
    return DynamicCache(config=model.config)


class PromptCache:
    """The keys and values of one sequence of tokens, of one model with one choice of adapters."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._values: DynamicCache | None = None
        self._ids: list[int] = []
        self._adapters: dict[str, float] = {}

    def take(self, model: PreTrainedModel, ids: Sequence[int]) -> DynamicCache | None:
        """Return a cache with the tokens at the start of `ids` that it has already; None if it cannot be reused.

        The caller passes it to `keep` after generation. Until then this object is empty: a forward pass that was
        interrupted leaves layers of different lengths.
        """
        values, known, adapters = self._values, self._ids, self._adapters
        self._clear()
        handle = own_handle(model)
        self._adapters = {} if handle is None else handle.active
        new = empty_cache(model)
        if new is None or any(type(layer) is not DynamicLayer for layer in new.layers):
            return None  # layers with a window or a state cannot remove their last tokens
        if values is None or adapters != self._adapters:
            return new
        # The model must compute the last token's scores.
        common = min(common_length(known, ids), len(ids) - 1)
        if not common:
            return new
        if common < len(known):
            values.crop(common - len(known))  # a negative number of tokens to remove
        return values

    def keep(self, values: DynamicCache, ids: Sequence[int]) -> None:
        """Store the cache of a generation whose prompt and text are `ids`. It lacks the last token."""
        self._values, self._ids = values, list(ids[: values.get_seq_length()])
