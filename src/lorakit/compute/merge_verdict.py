"""A verdict on a merged model: how closely it follows its base with the unmerged adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.adapters.handle import own_handle
from lorakit.adapters.installed import base_parameters
from lorakit.compute.agreement import Agreement, agreement, logits_of_prompts
from lorakit.formatting import percentage
from lorakit.models.dtypes import dtype_name
from lorakit.models.loading import Base

WHOLE = 0.99
"""Share of the update above which rounding needs no advice."""

IN_FLOAT32 = "--base.dtype float32"
"""The option that merges without loss."""


@dataclass(frozen=True, kw_only=True)
class MergeVerdict(Agreement):
    """The differences between a merged model and its base with the unmerged adapter."""

    kept: float
    """Share of the update's squared norm that survives rounding to `dtype`, from 0 to 1."""
    dtype: torch.dtype
    """Dtype of the merged weights."""

    def sentences(self) -> list[str]:
        """Return the verdict in words, with the option to use instead if the merge loses part of the adapter."""
        if self.predicts == "score":
            first = f"Compared with the unmerged adapter in {self.where}."
        elif self.changed:
            share = percentage(self.changed, self.predictions)
            first = f"The merge changes the most likely {self.predicts} in {self.changed} of {self.where} ({share})."
        else:
            first = f"The merge changes the most likely {self.predicts} in none of {self.where}."
        lines = [
            first,
            f"Largest difference from the unmerged logits: {self.difference:.2g}; largest logit: {self.scale:.3g}.",
            f"{percentage(self.kept, 1)} of the adapter's weight update survives rounding to {dtype_name(self.dtype)}.",
        ]
        if self.dtype != torch.float32 and (self.changed or self.kept < WHOLE):
            lines.append(f"To keep the whole update, merge in float32: add {IN_FLOAT32}.")
        return lines


def judge_merge(
    adapted: Base, stored: StoredAdapter, merge: Callable[[], PreTrainedModel]
) -> MergeVerdict:
    """Compare a merged model with its base and the unmerged adapter on several prompts.

    `adapted` is the base with the adapter active. The tensors of `stored`, the adapter's file, are not rounded to the
    dtype of the base. `merge` may merge `adapted` in place, because it is called after the unmerged model was read.

    Raises:
        BaseModelError: The output of either model is NaN.
    """
    model, tokenizer = adapted.model, adapted.text_tokenizer
    dtype = model.dtype
    kept = _kept(adapted, stored)
    before = logits_of_prompts(model, tokenizer)
    after = logits_of_prompts(merge(), tokenizer)
    return MergeVerdict(kept=kept, dtype=dtype, **vars(agreement(before, after)))


@torch.no_grad()
def _kept(adapted: Base, stored: StoredAdapter) -> float:
    """Return the share of the adapter's squared weight update that survives rounding."""
    update = lost = 0.0
    for base, exact, merged in _merged_weights(adapted, stored):
        update += _squared_norm(exact - base.to(exact.dtype))
        lost += _squared_norm(merged.to(exact.dtype) - exact)
    return max(0.0, 1 - lost / update) if update else 1.0


def _merged_weights(
    adapted: Base, stored: StoredAdapter
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield base, unrounded and rounded tensor of each parameter that the active adapter changes.

    A new head is not included: the difference from its random start would hide that of all others.
    """
    handle = own_handle(adapted.model)
    assert handle is not None
    yield from handle.merged_weights()
    for name, base in base_parameters(adapted.model):
        if name in stored.trained and name not in adapted.new_weights:
            exact = stored.trained[name].to(base.device, torch.float32)
            yield base, exact, exact.to(base.dtype)


def _squared_norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float32)) ** 2
