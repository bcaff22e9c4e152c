"""Masked attention on a GPU with torch's FlexAttention, which skips fully masked blocks.

For each block of 128 queries, a compiled kernel looks up the blocks of keys that any of these queries can see
(Dong et al. 2024). In a tree of examples (`lorakit.data.packing`) most blocks are fully masked.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.weak import WeakTensorKeyDictionary

from lorakit.ops.attention import fused_attention, mask_cache
from lorakit.ops.autocast import autocast_to
from lorakit.ops.compiling import allow_graphs


def flex_masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float,
) -> Tensor:
    """Compute `lorakit.ops.attention.masked_attention` with FlexAttention.

    The fused kernel computes the cases that FlexAttention does not support: no mask, no rows. It also computes a
    single query (decoding), because no block can be skipped. On a CPU, FlexAttention computes all pairs and has no
    gradient.
    """
    query, key, value = autocast_to(query, key, value)
    if mask is None or not flex_serves(query):
        return fused_attention(query, key, value, mask, scale=scale)
    attend = flex_attention if query.device.type == "cpu" else _compiled()
    for tensor in (query, key, value):
        # The number of heads and their size never change. Without this mark the compiler may unify the number of
        # heads with an equal number of rows, and recompile when the two differ.
        torch._dynamo.mark_static(tensor, 1)
        torch._dynamo.mark_static(tensor, 3)
    blocks = _block_mask(mask, query, key)
    out = attend(query, key, value, block_mask=blocks, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


def flex_serves(query: Tensor) -> bool:
    """Return whether FlexAttention supports this number of queries and can skip blocks."""
    rows, _, length, _ = query.shape
    return length > 1 and rows > 0


@cache
def _compiled() -> Any:
    """Return the kernel, compiled for any number and length of rows.

    torch compiles one graph for each combination of: one or more rows, one or more blocks, gradients of the keys,
    gradients at all, and one mask per row or per batch. These exceed its default limit per function.
    """
    allow_graphs()
    return torch.compile(flex_attention, dynamic=True)


_block_masks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Cached block masks by mask; all layers of a model share one mask."""


def _block_mask(mask: Tensor, query: Tensor, key: Tensor) -> BlockMask:
    B, T, S = query.shape[0], query.shape[2], key.shape[2]
    cached: dict[tuple[int, int, int], BlockMask] = mask_cache(mask, _block_masks)
    if (B, T, S) not in cached:
        # A view would keep the mask and its cache entry alive until the backward pass.
        visible = mask.clone().expand(B, 1, T, S)[:, 0]

        def mask_mod(row: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return visible[row, i, j]

        cached[B, T, S] = create_block_mask(mask_mod, B, None, T, S, device=str(mask.device))
    return cached[B, T, S]
