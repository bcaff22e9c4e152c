"""What reads or changes the scores of each generated token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PreTrainedModel,
    StoppingCriteria,
)

from lorakit.compute.finite import refuse_nan


class StopIfInterrupted(StoppingCriteria):
    """Ends the generation of all rows once a function returns True."""

    def __init__(self, interrupted: Callable[[], bool]) -> None:
        self.interrupted = interrupted

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:  # type: ignore[override]
        """Return for each row (B) whether its text ends."""
        return torch.full((len(input_ids),), self.interrupted(), device=input_ids.device)


class RefuseNaN(LogitsProcessor):
    """Raises a BaseModelError if the scores of a step are NaN, which decoding would turn into some token."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores (B, V) unchanged."""
        refuse_nan(self.model, scores)
        return scores


class NoRepeatedNGrams(LogitsProcessor):
    """Bans tokens that would repeat an n-gram of the new text.

    The processor of transformers also counts the n-grams of the prompt, whose names and numbers a text has to repeat.
    """

    def __init__(self, size: int, start: int) -> None:
        """Ban n-grams of `size` tokens after the first `start` tokens of each row."""
        self.start = start
        self.ban = NoRepeatNGramLogitsProcessor(size)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores (B, V) with minus infinity at banned tokens."""
        return self.ban(input_ids[:, self.start :], scores)  # type: ignore[arg-type]
