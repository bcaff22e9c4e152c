"""Attention under a known mask on a GPU: torch's FlexAttention, which skips what the mask hides.

A kernel is compiled that looks up, for each block of 128 queries, the blocks of keys in which any of them sees
something (Dong et al. 2024). Of a tree of examples (`lorakit.data.packing`) most blocks show nothing.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.weak import WeakTensorKeyDictionary

from lorakit.ops.attention import fused_attention, known_of
from lorakit.ops.autocast import autocast_to
from lorakit.ops.compiling import allow_graphs


def flex_masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """Return what `lorakit.ops.masked_attention` returns, of the same arguments.

    What FlexAttention does not have goes to the fused kernel: dropout, no mask, no rows. So does a single query, as
    in decoding, of which nothing can be skipped. On a CPU it computes all pairs, and has no gradient.
    """
    query, key, value = autocast_to(query, key, value)
    if mask is None or not flex_serves(query, dropout):
        return fused_attention(query, key, value, mask, scale=scale, dropout=dropout)
    attend = flex_attention if query.device.type == "cpu" else _compiled()
    for tensor in (query, key, value):
        # The kernel is one for these numbers anyway. Told so, the compiler does not take a number of rows that
        # happens to be that of the heads for the same, and compile anew where they differ.
        torch._dynamo.mark_static(tensor, 1)
        torch._dynamo.mark_static(tensor, 3)
    blocks = _block_mask(mask, query, key)
    out = attend(query, key, value, block_mask=blocks, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


def flex_serves(query: Tensor, dropout: float) -> bool:
    """Whether FlexAttention has what is asked for, and a mask could spare it something."""
    rows, _, length, _ = query.shape
    return not dropout and length > 1 and rows > 0


@cache
def _compiled() -> Any:
    """The kernel, for rows of any number and length.

    One graph each for one row or more, one block or more, a key with or without a gradient, a pass with or without,
    a mask of its own for each row or one for all: more than torch allows a function by default.
    """
    allow_graphs()
    return torch.compile(flex_attention, dynamic=True)


_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""The blocks of a mask, which all layers of a model are shown."""


def _block_mask(mask: Tensor, query: Tensor, key: Tensor) -> BlockMask:
    B, T, S = query.shape[0], query.shape[2], key.shape[2]
    found: dict[tuple[int, int, int], BlockMask] = known_of(mask, _known)
    if (B, T, S) not in found:
        # A copy: the backward pass reads it again, and a view would keep the mask, and what is known of it, alive.
        seen = mask.clone().expand(B, 1, T, S)[:, 0]

        def sees(row: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return seen[row, i, j]

        found[B, T, S] = create_block_mask(sees, B, None, T, S, device=str(mask.device))
    return found[B, T, S]
