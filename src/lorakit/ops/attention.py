"""Masked attention that skips the keys hidden by the mask.

The queries of a row are split into blocks. Each block gathers the keys that any of its queries can see. In a
tree of examples (`lorakit.data.packing`) each token sees a small part of its row, so most query-key pairs are
never computed. Blocks with similar numbers of keys form one batched product, whose scores fit the CPU's cache.
On a CPU, at the lengths of such rows, this is several times as fast as the fused kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lorakit.ops.autocast import autocast_to, no_autocast, wide_dtype
from lorakit.ops.derivatives import Function, apply, once_differentiable
from lorakit.ops.dropout import keep_mask, multiplier
from lorakit.ops.rows import round_up

BLOCK_SIZES = (32, 64, 128)
"""Candidate numbers of queries per block. Small blocks skip more masked pairs; large blocks have faster products."""

KEY_STEP = QUERY_STEP = 32
"""The keys and the queries of a block are rounded up to multiples of these. A CPU library builds and caches kernels for
every new shape: without rounding, 60 batches have 74 shapes, with it 6."""

BLOCK_STEP = 4
"""Groups end at multiples of this number of blocks, for the same reason."""

GATHER_PAIRS = 32
"""Cost of gathering one key and its value, and of scattering their gradients, in query-key pairs."""

GROUP_PAIRS = 2**21
"""Maximum query-key pairs per group over all heads: 8 MB of float32 scores, which fit a CPU's cache."""

MAX_SAVED_KEYS = 256
"""Longest block, in keys, whose probabilities are saved for the backward pass. Those of longer blocks would exceed
all other saved tensors of a layer, so the backward pass recomputes them."""

MAX_KEYS = 4096
"""Longest block, in keys, that is computed here. Longer ones use the fused kernel, which reads the mask directly
and needs no float32 bias of four bytes per pair."""


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """Return ``softmax(scale * Q K^T, where the mask is True) V`` (Vaswani et al. 2017, equation 1).

    The softmax is computed in float32 (float64 for float64 input). The products are computed in the dtype of `query`,
    or in the autocast dtype if autocast is on. In bfloat16 each score is rounded before the softmax, as in the eager
    attention of `transformers`; the fused kernels keep scores in float32. The output is within 0.3 % of float64 for
    scores of standard deviation 1 (fused kernel 0.2 %), and within 0.6 % for 4 (0.2 %).

    Args:
        query: Shape (B, H, T, D).
        key: Shape (B, K, S, D); K divides H, and H / K neighbouring heads of `query` share one of `key`.
        value: Shape (B, K, S, D).
        mask: Bool, shape (B or 1, 1, T or 1, S), True where a query can see a key; None masks nothing. The
            output of a query that sees no key is finite but meaningless. Or a float bias without gradient, shape
            (B or 1, H or 1, T or 1, S), which is added to the scaled products.
        scale: Factor on the products of queries and keys.
        dropout: Probability of setting an attention weight to zero. The other weights are divided by
            ``1 - dropout``.

    Returns:
        Shape (B, T, H, D); flatten the last two dimensions for the output projection.
    """
    query, key, value = autocast_to(query, key, value)
    if not len(query):
        return fused_attention(query, key, value, mask, scale=scale)
    blocks = _blocks(mask, query, key)
    if blocks.length > MAX_KEYS:
        return fused_attention(query, key, value, mask, scale=scale, dropout=dropout)
    with no_autocast(query):
        return apply(_MaskedAttention, query, key, value, blocks, scale, dropout)


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """Compute `masked_attention` with torch's fused kernel, which does not store the scores."""
    if (queries_per_key := query.shape[1] // key.shape[1]) > 1:
        key = key.repeat_interleave(queries_per_key, 1)
        value = value.repeat_interleave(queries_per_key, 1)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale
    ).transpose(1, 2)


@dataclass(frozen=True, slots=True)
class _Group:
    """G blocks of b queries with L keys each, computed together."""

    blocks: slice
    """Range of the blocks, in sorted order."""
    length: int
    """L."""
    bias: Tensor | None = None
    """Added to the scores, shape (G or 1, K or 1, H / K or 1, b, L): 0 where a query sees a key and the lowest float32
    where not, unless the caller gives the values."""
    keys: Tensor | None = None
    """Shape (G * K * L): index of each gathered key among the B * K * S keys; None for G whole rows."""

    def gather(self, x: Tensor) -> Tensor:
        """Gather this group's rows of a key or value tensor: (B, K, S, D) to (G * K, L, D)."""
        width = x.shape[-1]
        if self.keys is None:
            return x[self.blocks].reshape(-1, self.length, width)
        return x.reshape(-1, width).index_select(0, self.keys).view(-1, self.length, width)


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Split of the T queries of each of B rows into N blocks, and the groups of these blocks."""

    groups: tuple[_Group, ...]
    count: int = 1
    """N; 1 if each block is a whole row with all its keys, without gathering."""
    size: int | None = None
    """b, the queries per block; None for whole rows."""
    order: Tensor | None = None
    """Shape (B * N): the blocks in ascending order of their numbers of keys; None keeps the original order."""
    uses: Tensor | None = None
    """Indices into the concatenated gathered keys of all groups, sorted by key, without padding."""
    offsets: Tensor | None = None
    """Shape (B * K * S): start of each key's indices in `uses`."""

    @property
    def length(self) -> int:
        """Keys of the longest block."""
        return self.groups[-1].length

    def split(self, x: Tensor, heads: int) -> Tensor:
        """Pad T and split into sorted blocks: (B, H, T, D) to (B * N, K, H / K * b, D)."""
        B, H, T, D = x.shape
        size = self.size or T
        if padding := size * self.count - T:
            x = F.pad(x, (0, 0, 0, padding))
        x = x.reshape(B, heads, H // heads, self.count, size, D)
        x = x.permute(0, 3, 1, 2, 4, 5).reshape(B * self.count, heads, -1, D)
        return x if self.order is None else x.index_select(0, self.order)

    def join(self, x: Tensor, shape: torch.Size) -> Tensor:
        """Invert `split`, with the heads after the tokens: (B * N, K, H / K * b, D) to (B, T, H, D)."""
        B, H, T, D = shape
        if self.order is not None:
            x = torch.empty_like(x).index_copy_(0, self.order, x)
        x = x.view(B, self.count, x.shape[1], H // x.shape[1], -1, D)
        return x.permute(0, 1, 4, 2, 3, 5).reshape(B, -1, H, D)[:, :T]

    def scatter(self, x: Tensor, shape: torch.Size) -> Tensor:
        """Scatter-add the gradients of the gathered keys of all groups, (M, D), to (B, K, S, D)."""
        if self.uses is None or self.offsets is None:
            return x.view(shape)
        return F.embedding_bag(self.uses, x, self.offsets, mode="sum").view(shape)


_blocks_by_mask: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Cached blocks by mask; all layers of a model share one mask."""


def mask_cache(mask: Tensor, caches: WeakTensorKeyDictionary) -> dict[Any, Any]:
    """Return the mutable cache entry of this mask; a new one if the mask was modified since.

    A tensor made in `torch.inference_mode` counts no modifications, so such a mask must not be modified.
    """
    # Inference tensors have no version counter.
    version = 0 if mask.is_inference() else mask._version
    if mask not in caches or caches[mask][0] != version:
        caches[mask] = (version, {})
    return caches[mask][1]


def _blocks(mask: Tensor | None, query: Tensor, key: Tensor) -> _Blocks:
    (B, H, T, _), (_, K, S, _) = query.shape, key.shape
    if mask is None:
        return _whole_rows(B, H * T, S)
    if mask.is_floating_point():
        return _whole_rows(B, H * T, S, mask.expand(B, H, T, S).unflatten(1, (K, -1)))
    cached: dict[tuple[int, ...], _Blocks] = mask_cache(mask, _blocks_by_mask)
    shape = (B, H, T, K)
    if shape not in cached:
        cached[shape] = _cheapest_blocks(mask.expand(B, 1, T, -1)[:, 0], H, K)
    return cached[shape]


def _whole_rows(B: int, pairs_per_key: int, S: int, bias: Tensor | None = None) -> _Blocks:
    """Return one block per row with all its keys, grouped up to GROUP_PAIRS."""
    groups = [
        _Group(blocks, S, None if bias is None else bias[blocks])
        for blocks in _runs([S] * B, pairs_per_key)
    ]
    return _Blocks(tuple(groups))


def _runs(lengths: list[int], pairs_per_key: int, step: int = 1) -> Iterator[slice]:
    """Divide blocks, sorted by their number of keys, into runs of up to GROUP_PAIRS pairs, or of `step` blocks."""
    start = 0
    for i in range(step, len(lengths), step):
        last = min(i + step, len(lengths))
        if (last - start) * lengths[last - 1] * pairs_per_key > GROUP_PAIRS:
            yield slice(start, i)
            start = i
    yield slice(start, len(lengths))


def _cheapest_blocks(mask: Tensor, H: int, K: int) -> _Blocks:
    """Split the rows of `mask` (B, T, S) into the blocks of lowest cost, or keep them whole."""
    B, T, S = mask.shape
    sizes = [size for size in BLOCK_SIZES if size < T]
    # Planning traces a step with masks that have no data.
    if mask.is_meta or isinstance(mask, torch._subclasses.FakeTensor):
        sizes = []
    best, lowest_cost = None, B * T * S
    for max_size in sizes:
        count = -(-T // max_size)
        size = round_up(-(-T // count), QUERY_STEP)
        padded = F.pad(mask, (0, 0, 0, size * count - T)).view(B * count, size, S)
        lengths, order = padded.any(1).sum(-1).clamp(min=1).sort(stable=True)
        lengths = [min(round_up(length, KEY_STEP), S) for length in lengths.tolist()]
        runs = list(_runs(lengths, H * size, BLOCK_STEP))
        keys = sum((run.stop - run.start) * lengths[run.stop - 1] for run in runs)
        cost = keys * (size + GATHER_PAIRS)
        if cost < lowest_cost:
            best, lowest_cost = (padded, order, runs, lengths), cost
    if best is None:
        return _whole_rows(B, H * T, S, _bias(mask)[:, None, None])
    return _gathered_blocks(*best, rows=B, heads=K)


def _gathered_blocks(
    mask: Tensor, order: Tensor, runs: list[slice], lengths: list[int], rows: int, heads: int
) -> _Blocks:
    """Return the blocks of `mask` (B * N, b, S) with their visible keys, padded to the longest of each group."""
    _, size, S = mask.shape
    count = len(mask) // rows
    head = torch.arange(heads, device=mask.device)[:, None]
    groups, is_visible = [], []
    for run in runs:
        group_mask, length = mask[order[run]], lengths[run.stop - 1]
        # The stable sort moves visible keys to the front and keeps their order.
        visible, key = group_mask.any(1).sort(dim=1, descending=True, stable=True)
        visible, key = visible[:, :length], key[:, :length]
        group_mask = group_mask.gather(2, key[:, None].expand(-1, mask.shape[1], -1))
        row = torch.div(order[run], count, rounding_mode="floor")
        keys = (row[:, None, None] * heads + head) * S + key[:, None]
        groups.append(_Group(run, length, _bias(group_mask)[:, None, None], keys.flatten()))
        is_visible.append(visible[:, None].expand(-1, heads, -1).flatten())
    uses = torch.cat(is_visible).nonzero().squeeze(1)
    sorted_keys, by_key = torch.cat([group.keys for group in groups])[uses].sort(stable=True)
    offsets = torch.searchsorted(sorted_keys, torch.arange(rows * heads * S, device=mask.device))
    return _Blocks(tuple(groups), count, size, order, uses=uses[by_key], offsets=offsets)


def _bias(mask: Tensor) -> Tensor:
    bias = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    return bias.masked_fill_(~mask, torch.finfo(torch.float32).min)


class _MaskedAttention(Function):
    @staticmethod
    def forward(ctx, query, key, value, blocks, scale, dropout):
        Q = blocks.split(query, key.shape[1])
        out = _empty(Q)
        saved_P, dropout_masks = [], []
        for group in blocks.groups:
            P = weights = _probabilities(Q[group.blocks], group.gather(key), group.bias, scale)
            if dropout:
                keep = keep_mask(P, dropout)
                weights = multiplier(keep, dropout, P.dtype).mul_(P)
                dropout_masks.append(keep)
            if blocks.length <= MAX_SAVED_KEYS:
                saved_P.append(P)
            torch.bmm(weights, group.gather(value), out=out[group.blocks].flatten(0, 1))
        ctx.save_for_backward(query, key, value, *saved_P, *dropout_masks)
        ctx.blocks, ctx.scale, ctx.dropout, ctx.saved_count = blocks, scale, dropout, len(saved_P)
        return blocks.join(out, query.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, *saved = ctx.saved_tensors
        saved_P, dropout_masks = saved[: ctx.saved_count], saved[ctx.saved_count :]
        blocks, heads = ctx.blocks, key.shape[1]
        Q, G = (blocks.split(x, heads) for x in (query, grad.transpose(1, 2)))
        grad_Q = _empty(Q)
        grads_K, grads_V = [], []
        for i, group in enumerate(blocks.groups):
            q, g = (x[group.blocks].flatten(0, 1) for x in (Q, G))
            k, v = group.gather(key), group.gather(value)
            P = saved_P[i] if saved_P else _probabilities(Q[group.blocks], k, group.bias, ctx.scale)
            factors = multiplier(dropout_masks[i], ctx.dropout, P.dtype) if ctx.dropout else None
            weights = P if factors is None else factors * P
            grads_V.append(torch.bmm(weights.transpose(1, 2), g).flatten(0, 1))
            grad_P = torch.bmm(g, v.transpose(1, 2))
            if factors is not None:
                grad_P.mul_(factors)
            grad_S = torch.ops.aten._softmax_backward_data(grad_P, P, -1, P.dtype).mul_(ctx.scale)
            torch.bmm(grad_S, k, out=grad_Q[group.blocks].flatten(0, 1))
            grads_K.append(torch.bmm(grad_S.transpose(1, 2), q).flatten(0, 1))
        return (
            blocks.join(grad_Q, query.shape).transpose(1, 2),
            blocks.scatter(_concatenate(grads_K), key.shape),
            blocks.scatter(_concatenate(grads_V), value.shape),
            None,
            None,
            None,
        )


def _empty(x: Tensor) -> Tensor:
    """Return a contiguous empty tensor like `x`, so that its flattened slices are views for `out=`."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _concatenate(parts: list[Tensor]) -> Tensor:
    """Concatenate without copying a single part."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _probabilities(Q: Tensor, K: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Return softmax(scale * Q K^T + bias), shape (G * K, H / K * b, L), in the dtype of `Q` (G, K, H / K * b, D)."""
    scores = torch.bmm(Q.flatten(0, 1), K.transpose(1, 2)).to(wide_dtype(Q)).mul_(scale)
    if bias is not None:
        b, length = bias.shape[-2:]
        scores.view(len(Q), Q.shape[1], -1, b, length).add_(bias)
    return scores.softmax(-1).to(Q.dtype)
