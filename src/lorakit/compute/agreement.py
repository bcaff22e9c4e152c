"""How closely one model predicts what another one predicts, on prompts of several kinds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorakit.compute.batching import context_length
from lorakit.compute.finite import refuse_nan
from lorakit.compute.mode import evaluating

PROMPTS = (
    "The quick brown fox jumps over the lazy dog.",
    "Water boils at a lower temperature in the mountains, because the air pressure is lower.",
    "Question: What is the capital of France?\nAnswer: The capital of France is Paris.",
    "Dear Ms Novak, thank you for your letter of 3 May. We will send the parcel again on Monday.",
    "def area(width, height):\n    return width * height\n",
    "name: Blue Spice, food: Italian, price: cheap, area: riverside",
    "The film starts slowly, but its last hour is one of the best of the year.",
    "SELECT name, price FROM products WHERE price < 20 ORDER BY price;",
)
"""Prompts of several kinds; the predictions are compared at each of their tokens."""

LARGEST_DIFFERENCE = {torch.float32: 1e-3, torch.float64: 1e-8}
"""Largest difference between scores of one model computed in two ways, relative to their norm, that is rounding."""
LARGEST_OF_SHORT = 0.1
"""The same for 16-bit dtypes. Another attention (a missing window or bias) gives about 1."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """The differences between the predictions of two models."""

    predicts: str
    """What the models predict: token, label or score."""
    predictions: int
    """Number of compared predictions."""
    changed: int
    """Number of predictions whose most likely token or label differs; 0 for scores."""
    difference: float
    """Largest absolute difference between the logits."""
    scale: float
    """Largest absolute logit of the first model."""

    @property
    def where(self) -> str:
        """The compared predictions in words."""
        return f"{self.predictions} predictions on {len(PROMPTS)} prompts"


def logits_of_prompts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
    """Return the logits of each prompt: (tokens, vocabulary), or (labels,) of a classifier.

    Raises:
        BaseModelError: A logit is NaN.
    """
    results, context = [], context_length(model)
    with evaluating(model):
        for prompt in PROMPTS:
            inputs = tokenizer(
                prompt, return_tensors="pt", truncation=context is not None, max_length=context
            ).to(model.device)
            if model.config.is_encoder_decoder:  # the logits depend on both inputs
                inputs["decoder_input_ids"] = inputs["input_ids"]
            logits = model(**inputs).logits[0].float()
            refuse_nan(model, logits)
            results.append(logits)
    return results


def agreement(before: Sequence[Tensor], after: Sequence[Tensor]) -> Agreement:
    """Compare the logits of two models, each from `logits_of_prompts`."""
    outputs = before[0].shape[-1]
    pairs = list(zip(before, after, strict=True))
    is_score = before[0].dim() == 1 and outputs == 1
    return Agreement(
        predicts="token" if before[0].dim() > 1 else "score" if is_score else "label",
        predictions=sum(logits[..., 0].numel() for logits in before),
        changed=sum(int((one.argmax(-1) != other.argmax(-1)).sum()) for one, other in pairs),
        difference=max(float((other - one).abs().max()) for one, other in pairs),
        scale=max(float(logits.abs().max()) for logits in before),
    )


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference between two tensors of scores, relative to that of the second."""
    return float((found - expected).float().norm() / expected.float().norm())


def largest_rounding(dtype: torch.dtype, of_short: float = LARGEST_OF_SHORT) -> float:
    """Return the largest relative difference that is taken for rounding in a dtype; `of_short` in 16 bits."""
    return LARGEST_DIFFERENCE.get(dtype, of_short)
