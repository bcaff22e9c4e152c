"""Dropout whose masks depend on the tokens of a batch, also in code that calls torch's functions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.ops.attention import masked_attention
from lorakit.ops.derivatives import is_transformed
from lorakit.ops.dropout import Keys, active, draws_itself, dropout, stock_dropout
from lorakit.ops.seeding import in_one_thread

stock_attention = F.scaled_dot_product_attention


@contextmanager
def keyed(keys: Keys) -> Iterator[None]:
    """Draw the masks of dropout from the keys of a batch, in its forward and backward pass inside this block.

    Replaces `torch.nn.functional.dropout` and `scaled_dot_product_attention` in the whole process: modules call them
    by these names. A mode (`torch.overrides`) would reach them too, but costs a microsecond for every operation.

    Raises:
        LorakitError: Another thread trains or plans.
    """
    with in_one_thread():
        # Other code may have replaced the functions too.
        before = active.keys, F.dropout, F.scaled_dot_product_attention
        try:
            active.keys = keys
            F.dropout, F.scaled_dot_product_attention = _dropout, _attention
            yield
        finally:
            active.keys, F.dropout, F.scaled_dot_product_attention = before


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or not 0 < p < 1 or not draws_itself(input) or is_transformed(input):
        return stock_dropout(input, p, training, inplace)
    dropped = dropout(input, p)
    return input.copy_(dropped) if inplace else dropped


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute attention with keyed dropout of its weights, which torch's fused kernels do not support."""
    if not dropout_p or not draws_itself(query) or is_transformed(query):
        return stock_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if is_causal:
        T, S = query.shape[-2], key.shape[-2]
        attn_mask = torch.ones(1, 1, T, S, dtype=torch.bool, device=query.device).tril()
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    if _is_plain(attn_mask) and query.ndim == 4 and value.shape[-1] == query.shape[-1]:
        attended = masked_attention(query, key, value, attn_mask, scale=factor, dropout=dropout_p)
        return attended.transpose(1, 2)
    if (queries_per_key := query.shape[-3] // key.shape[-3]) > 1:
        key = key.repeat_interleave(queries_per_key, -3)
        value = value.repeat_interleave(queries_per_key, -3)
    scores = query @ key.mT * factor
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return dropout(scores.softmax(-1), dropout_p) @ value


def _is_plain(mask: Tensor | None) -> bool:
    """Return whether `masked_attention` supports a mask."""
    if mask is None:
        return True
    by_head = mask.ndim != 4 or (mask.dtype == torch.bool and mask.shape[1] != 1)
    return not by_head and not mask.requires_grad
