"""A model's own layers, computed faster while lorakit trains it: attention and dropout.

The classes, tensors and results of the model stay what they are. Its attention goes through the place that
`transformers` has for attentions of others; what that place cannot express goes to the stock function.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lorakit.ops import dropout, masked_attention

ATTENTION = "lorakit"
"""Name under which `transformers` knows our attention."""

LONGEST = 1024
"""Keys up to which whole rows of pairs are formed; beyond, their memory asks for the fused kernel."""

NOT_OURS = ("position_bias", "softcap", "s_aux")
"""Arguments of some attentions that ours does not have."""


@contextmanager
def faster(model: PreTrainedModel) -> Iterator[None]:
    """Compute `model` with our attention and dropout as long as the context is open.

    A model that takes no attention of others keeps its own.
    """
    stock = model.config._attn_implementation
    dropouts = [m for m in model.modules() if type(m) is nn.Dropout and m.p and not m.inplace]
    ours = stock == "sdpa" and model.device.type == "cpu"
    if ours:
        model.set_attn_implementation(ATTENTION)
    for module in dropouts:
        module.forward = partial(_dropout, module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in dropouts:
            del module.forward
        if ours:
            model.set_attn_implementation(stock)


def _dropout(module: nn.Dropout, x: Tensor) -> Tensor:
    return dropout(x, module.p) if module.training else x


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as `transformers` calls it: heads before tokens in, tokens before heads out."""
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    if (
        torch.compiler.is_compiling()
        or (attention_mask is None and causal and query.shape[2] > 1)
        or (attention_mask is not None and not _is_plain(attention_mask))
        or key.shape[2] > LONGEST
        or any(options.get(name) is not None for name in NOT_OURS)
    ):
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            dropout=dropout,
            is_causal=is_causal,
            **options,
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return masked_attention(query, key, value, attention_mask, scale=scale, dropout=dropout), None


def _is_plain(mask: Tensor) -> bool:
    """Whether a mask says what is seen, the same for all heads."""
    return mask.dtype == torch.bool and mask.ndim == 4 and mask.shape[1] == 1


def _mask(*args: Any, **options: Any) -> Tensor | None:
    """The mask of stock attention, also where that would leave it out: we have no causal kernel."""
    return sdpa_mask(*args, **{**options, "allow_is_causal_skip": False})


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _mask)
