"""Compute a model's own layers faster and in less memory during training.

The classes, tensors and results of the model do not change. Our attention is registered with `transformers`; cases
that it does not support fall back to the stock function. On a CPU, dropout, norms and activations get a forward of
ours, each after a check that it computes the same as the layer's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lorakit.models.faster_layers import FasterForward, faster_forward
from lorakit.models.sharding import gathered
from lorakit.ops.attention import masked_attention
from lorakit.ops.flex_attention import flex_masked_attention, flex_serves

STOCK = "sdpa"
"""The attention implementation that ours replaces."""

ATTENTION = "lorakit"
"""The name of our attention in `transformers`."""

ATTENTION_DROPOUT = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
"""Configuration fields that hold the dropout of attention weights."""

UNSUPPORTED = ("position_bias", "softcap", "s_aux", "sinks")
"""Arguments of some models' attention that ours does not support."""

SPARSE = ("indices", "block_indices")
"""Arguments that select keys for each query. Such models put the selection into the mask for stock attention only."""


def make_faster(model: PreTrainedModel) -> None:
    """Use our attention, dropout, norms and activations in `model`, until `make_stock`.

    All are written for CPUs.
    """
    use_own_attention(model)
    _make_layers_faster(model)


def _make_layers_faster(module: nn.Module) -> None:
    with gathered(module):
        if (forward := faster_forward(module)) is not None:
            module.forward = forward  # type: ignore[method-assign]
        for child in module.children():
            _make_layers_faster(child)


def use_own_attention(model: PreTrainedModel) -> None:
    """Use our attention in `model`, until `make_stock`: by blocks on a CPU, FlexAttention elsewhere.

    A model keeps its own attention if that is not torch's. On a GPU it also keeps it if it has attention dropout,
    which FlexAttention lacks. So does a sparse model (DeepSeek-V3.2): its indexer changes the stock mask only.
    """
    if any(name.endswith(".indexer") for name, _ in model.named_modules()):
        return
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


@torch.compiler.disable  # the computation depends on the values in the mask
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
    """Compute attention for `transformers`: (batch, heads, tokens, d) to (batch, tokens, heads, d).

    Raises:
        NotImplementedError: The attention is sparse; the mask lacks the selection, so falling back would be dense.
    """
    if selections := [name for name in SPARSE if options.get(name) is not None]:
        raise NotImplementedError(f"its attention is sparse ({selections[0]})")
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    if (
        (attention_mask is None and causal and query.shape[2] > 1)
        or (attention_mask is not None and not _is_plain(attention_mask))
        or any(options.get(name) is not None for name in UNSUPPORTED)
        or value.shape[-1] != query.shape[-1]  # DeepSeek, MiniCPM 3
        or (query.device.type != "cpu" and (dropout or not flex_serves(query)))
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
    if query.device.type != "cpu":
        return flex_masked_attention(query, key, value, attention_mask, scale=scale), None
    attended = masked_attention(query, key, value, attention_mask, scale=scale, dropout=dropout)
    return attended, None


def _is_plain(mask: Tensor) -> bool:
    """Whether a mask is boolean and shared by all heads."""
    return mask.dtype == torch.bool and mask.ndim == 4 and mask.shape[1] == 1


def _mask(*args: Any, **options: Any) -> Tensor | None:
    """Return the stock mask, including a purely causal one: we have no causal kernel."""
    return sdpa_mask(*args, **{**options, "allow_is_causal_skip": False})


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _mask)
