"""A model's own layers, computed faster and in less memory while lorakit trains it.

The classes, tensors and results of the model stay what they are. Its attention goes through the place that
`transformers` has for attentions of others; what that place cannot express goes to the stock function. On a CPU
dropout, norms and activations get a forward of ours, each kind after a trial that it gives what the layer's own does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lorakit.models.faster_layers import FasterForward, faster_forward
from lorakit.ops import flex_masked_attention, flex_serves, masked_attention

STOCK = "sdpa"
"""The attention that ours stands in for."""

ATTENTION = "lorakit"
"""Name under which `transformers` knows our attention."""

ATTENTION_DROPOUT = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
"""Names under which configurations have the dropout of attention weights."""

NOT_OURS = ("position_bias", "softcap", "s_aux")
"""Arguments of some attentions that ours does not have."""


def make_faster(model: PreTrainedModel) -> None:
    """Compute `model` with our attention, dropout, norms and activations, until `make_stock`.

    All are made for CPUs.
    """
    use_own_attention(model)
    for module in model.modules():
        if (forward := faster_forward(module)) is not None:
            module.forward = forward  # type: ignore[method-assign]


def use_own_attention(model: PreTrainedModel) -> None:
    """Compute the attention of `model` by ours, until `make_stock`: on a CPU by blocks, elsewhere by FlexAttention.

    A model whose attention is not torch's keeps its own, as does one with dropout inside it, which FlexAttention
    does not have.
    """
    drops = any(getattr(model.config, name, 0) for name in ATTENTION_DROPOUT)
    if model.config._attn_implementation == STOCK and (model.device.type != "cuda" or not drops):
        model.set_attn_implementation(ATTENTION)


def make_stock(model: PreTrainedModel) -> None:
    """Undo `make_faster` and `use_own_attention`."""
    if model.config._attn_implementation == ATTENTION:
        model.set_attn_implementation(STOCK)
    for module in model.modules():
        if isinstance(vars(module).get("forward"), FasterForward):
            del module.forward


@torch.compiler.disable  # how it is computed depends on what stands in the mask
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
        (attention_mask is None and causal and query.shape[2] > 1)
        or (attention_mask is not None and not _is_plain(attention_mask))
        or any(options.get(name) is not None for name in NOT_OURS)
        or (query.device.type != "cpu" and not flex_serves(query, dropout))
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
    attend = masked_attention if query.device.type == "cpu" else flex_masked_attention
    return attend(query, key, value, attention_mask, scale=scale, dropout=dropout), None


def _is_plain(mask: Tensor) -> bool:
    """Whether a mask says what is seen, the same for all heads."""
    return mask.dtype == torch.bool and mask.ndim == 4 and mask.shape[1] == 1


def _mask(*args: Any, **options: Any) -> Tensor | None:
    """The mask of stock attention, also where that would leave it out: we have no causal kernel."""
    return sdpa_mask(*args, **{**options, "allow_is_causal_skip": False})


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _mask)
