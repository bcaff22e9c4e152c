"""Attention under a known mask, computed where the mask lets something be seen.

The queries of a row are cut into blocks, and each block is computed against the keys that any of its
queries may see, gathered side by side. A tree of examples (`lorakit.data.packing`) shows each of its
tokens a small part of its row, so that most pairs are never formed. Blocks that see about as many keys
are one batched product, whose pairs stay in a processor's cache.
On a CPU, at the lengths of such rows, that is also several times as fast as the fused kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from lorakit.ops.autocast import autocast_to, no_autocast
from lorakit.ops.dropout import fast, kept, multiplier

BLOCK_SIZES = (32, 64, 128)
"""Queries in a block: fewer see fewer keys in vain, more make the products efficient."""

GATHER_PAIRS = 32
"""Pairs of a query and a key that cost as much as gathering one key and its value, and their gradients."""

GROUP_PAIRS = 2**21
"""Pairs, those of all heads, that are formed at a time: 8 MB of scores in float32, which a processor's cache holds."""

KEPT_KEYS = 256
"""Keys of the longest block up to which the probabilities are kept for the backward pass. Beyond, they would
outweigh all else that a layer keeps, and are computed anew."""

LONGEST = 4096
"""Keys of a block up to which its pairs are formed; beyond, their bias, four bytes for each that a row's queries
see, asks for the fused kernel, which reads the mask alone."""


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

    The softmax is computed in float32 (float64 for float64 input), the products in the dtype of `query`, or
    in that of autocast where it is on. In bfloat16 this rounds each score before the softmax, as the eager attention
    of `transformers` does; the fused kernels keep it in float32. With scores of standard deviation 1 the output is
    within 0.3 % of float64 (fused kernel 0.2 %), of 4 within 0.6 % (0.2 %).

    Args:
        query: Shape (B, H, T, D).
        key: Shape (B, K, S, D); K divides H, and H / K neighbouring heads of `query` share one of `key`.
        value: Shape (B, K, S, D).
        mask: Bool, shape (B or 1, 1, T or 1, S), True where a query may see a key; None shows all. What a
            query gets that may see nothing is finite and means nothing.
        scale: Factor on the products of queries and keys.
        dropout: Probability with which a weight is set to zero, the others divided by its complement.

    Returns:
        Shape (B, T, H, D): what the output projection takes, once the last two are joined.
    """
    query, key, value = autocast_to(query, key, value)
    if not len(query):
        return fused_attention(query, key, value, mask, scale=scale)
    blocks = _blocks(mask, query, key)
    if blocks.length > LONGEST:
        return fused_attention(query, key, value, mask, scale=scale, dropout=dropout)
    with no_autocast(query):
        return _MaskedAttention.apply(query, key, value, blocks, scale, dropout)


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """`masked_attention` by torch's own kernel, which never holds a row's pairs."""
    if (shared := query.shape[1] // key.shape[1]) > 1:
        key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale
    ).transpose(1, 2)


def masked_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, scale: float
) -> Tensor:
    """Plain PyTorch twin of `masked_attention`, without dropout."""
    shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    scores = (query @ key.transpose(-1, -2)).to(_wide(query)) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1).to(query.dtype) @ value).transpose(1, 2)


@dataclass(frozen=True, slots=True)
class _Group:
    """G blocks of b queries that are computed together, each with L keys."""

    blocks: slice
    """Which of the blocks, in their order."""
    length: int
    """L."""
    bias: Tensor | None = None
    """Shape (G or 1, 1, 1, b, L), float32: 0 where a query sees a key, else the lowest number."""
    keys: Tensor | None = None
    """Shape (G * K * L): which of the B * K * S keys stands there; None for those of G whole rows."""

    def gather(self, x: Tensor) -> Tensor:
        """(B, K, S, D) to (G * K, L, D)."""
        width = x.shape[-1]
        if self.keys is None:
            return x[self.blocks].reshape(-1, self.length, width)
        return x.reshape(-1, width).index_select(0, self.keys).view(-1, self.length, width)


@dataclass(frozen=True, slots=True)
class _Blocks:
    """How the T queries of each of B rows are cut into N blocks, and these are grouped."""

    groups: tuple[_Group, ...]
    count: int = 1
    """N; 1 where a block is a whole row with all its keys, and nothing is gathered."""
    order: Tensor | None = None
    """Shape (B * N): the blocks, those that see the fewest keys first; None leaves them as they come."""
    uses: Tensor | None = None
    """The places among the keys of all groups, key by key, without the padding of blocks that see fewer keys."""
    offsets: Tensor | None = None
    """Shape (B * K * S): where in `uses` the places of each key begin."""

    @property
    def length(self) -> int:
        """Keys of the longest block."""
        return self.groups[-1].length

    def split(self, x: Tensor, heads: int) -> Tensor:
        """(B, H, T, D) to (B * N, K, H / K * b, D) in their order, padded behind T."""
        B, H, T, D = x.shape
        size = -(-T // self.count)
        if pad := size * self.count - T:
            x = F.pad(x, (0, 0, 0, pad))
        x = x.reshape(B, heads, H // heads, self.count, size, D)
        x = x.permute(0, 3, 1, 2, 4, 5).reshape(B * self.count, heads, -1, D)
        return x if self.order is None else x.index_select(0, self.order)

    def join(self, x: Tensor, shape: torch.Size) -> Tensor:
        """Undo `split`, the heads behind the tokens: (B * N, K, H / K * b, D) to (B, T, H, D)."""
        B, H, T, D = shape
        if self.order is not None:
            x = torch.empty_like(x).index_copy_(0, self.order, x)
        x = x.view(B, self.count, x.shape[1], H // x.shape[1], -1, D)
        return x.permute(0, 1, 4, 2, 3, 5).reshape(B, -1, H, D)[:, :T]

    def scatter(self, x: Tensor, shape: torch.Size) -> Tensor:
        """What stands beside the keys of all groups, (?, D), to (B, K, S, D): summed where a key stands often."""
        if self.uses is None or self.offsets is None:
            return x.view(shape)
        return F.embedding_bag(self.uses, x, self.offsets, mode="sum").view(shape)


_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""The blocks of a mask, by what else decides them: all layers of a model are shown one mask."""


def known_of(mask: Tensor, known: WeakTensorKeyDictionary) -> dict[Any, Any]:
    """Return what is known of a mask, for more to be added; nothing where it was written into since."""
    # It counts writes; inference tensors have none.
    version = 0 if mask.is_inference() else mask._version
    if mask not in known or known[mask][0] != version:
        known[mask] = (version, {})
    return known[mask][1]


def _blocks(mask: Tensor | None, query: Tensor, key: Tensor) -> _Blocks:
    (B, H, T, _), (_, K, S, _) = query.shape, key.shape
    if mask is None:
        return _whole(B, H * T, S)
    found: dict[tuple[int, ...], _Blocks] = known_of(mask, _known)
    known_by = (B, H, T, K)
    if known_by not in found:
        found[known_by] = _cheapest_blocks(mask.expand(B, 1, T, -1)[:, 0], H, K)
    return found[known_by]


def _whole(B: int, pairs_a_key: int, S: int, bias: Tensor | None = None) -> _Blocks:
    """Rows with all their keys, as many at a time as a group holds."""
    groups = [
        _Group(blocks, S, None if bias is None else bias[blocks])
        for blocks in _runs([S] * B, pairs_a_key)
    ]
    return _Blocks(tuple(groups))


def _runs(lengths: list[int], pairs_a_key: int) -> Iterator[slice]:
    """Divide blocks, ordered by their number of keys, into runs of no more than GROUP_PAIRS, or of one."""
    start = 0
    for i, length in enumerate(lengths):
        if i > start and (i + 1 - start) * length * pairs_a_key > GROUP_PAIRS:
            yield slice(start, i)
            start = i
    yield slice(start, len(lengths))


def _cheapest_blocks(mask: Tensor, H: int, K: int) -> _Blocks:
    """Cut the rows of `mask` (B, T, S) into the blocks that form the fewest pairs, or leave them whole."""
    B, T, S = mask.shape
    sizes = [size for size in BLOCK_SIZES if size < T]
    # A tensor without data, on which a step is only planned, tells nothing about what it shows.
    if mask.is_meta or isinstance(mask, torch._subclasses.FakeTensor):
        sizes = []
    best, cost = None, B * T * S
    for least in sizes:
        count = -(-T // least)
        size = -(-T // count)
        padded = F.pad(mask, (0, 0, 0, size * count - T)).view(B * count, size, S)
        lengths, order = padded.any(1).sum(-1).clamp(min=1).sort(stable=True)
        lengths = lengths.tolist()
        runs = list(_runs(lengths, H * size))
        keys = sum((run.stop - run.start) * lengths[run.stop - 1] for run in runs)
        price = keys * (size + GATHER_PAIRS)
        if price < cost:
            best, cost = (padded, order, runs, lengths), price
    if best is None:
        return _whole(B, H * T, S, _bias(mask)[:, None, None])
    return _gathered(*best, rows=B, heads=K)


def _gathered(
    mask: Tensor, order: Tensor, runs: list[slice], lengths: list[int], rows: int, heads: int
) -> _Blocks:
    """Blocks of the queries of `mask` (B * N, b, S), each with the keys that it sees, or as many as its group."""
    S, count = mask.shape[-1], len(mask) // rows
    head = torch.arange(heads, device=mask.device)[:, None]
    groups, seen = [], []
    for run in runs:
        shown, length = mask[order[run]], lengths[run.stop - 1]
        # A stable sort puts the keys that a block sees first, in their order.
        sees, key = shown.any(1).sort(dim=1, descending=True, stable=True)
        sees, key = sees[:, :length], key[:, :length]
        shown = shown.gather(2, key[:, None].expand(-1, mask.shape[1], -1))
        row = torch.div(order[run], count, rounding_mode="floor")
        keys = (row[:, None, None] * heads + head) * S + key[:, None]
        groups.append(_Group(run, length, _bias(shown)[:, None, None], keys.flatten()))
        seen.append(sees[:, None].expand(-1, heads, -1).flatten())
    places = torch.cat(seen).nonzero().squeeze(1)
    owners, by_key = torch.cat([group.keys for group in groups])[places].sort(stable=True)
    offsets = torch.searchsorted(owners, torch.arange(rows * heads * S, device=mask.device))
    return _Blocks(tuple(groups), count, order, uses=places[by_key], offsets=offsets)


def _bias(mask: Tensor) -> Tensor:
    bias = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    return bias.masked_fill_(~mask, torch.finfo(torch.float32).min)


class _MaskedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, blocks, scale, dropout):
        Q = blocks.split(query, key.shape[1])
        out = _empty(Q)
        keep = blocks.length <= KEPT_KEYS
        kept_P, draws = [], []
        for group in blocks.groups:
            P = weights = _probabilities(Q[group.blocks], group.gather(key), group.bias, scale)
            if dropout:
                drawn, ctx.factor = _draw(P, dropout)
                weights = multiplier(drawn, ctx.factor, P.dtype).mul_(P)
                draws.append(drawn)
            if keep:
                kept_P.append(P)
            torch.bmm(weights, group.gather(value), out=out[group.blocks].flatten(0, 1))
        ctx.save_for_backward(query, key, value, *kept_P, *draws)
        ctx.blocks, ctx.scale, ctx.kept = blocks, scale, len(kept_P)
        return blocks.join(out, query.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, *saved = ctx.saved_tensors
        kept_P, draws = saved[: ctx.kept], saved[ctx.kept :]
        blocks, heads = ctx.blocks, key.shape[1]
        Q, G = (blocks.split(x, heads) for x in (query, grad.transpose(1, 2)))
        grad_Q = _empty(Q)
        grads_K, grads_V = [], []
        for i, group in enumerate(blocks.groups):
            q, g = (x[group.blocks].flatten(0, 1) for x in (Q, G))
            k, v = group.gather(key), group.gather(value)
            P = kept_P[i] if kept_P else _probabilities(Q[group.blocks], k, group.bias, ctx.scale)
            factors = multiplier(draws[i], ctx.factor, P.dtype) if draws else None
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
            blocks.scatter(_cat(grads_K), key.shape),
            blocks.scatter(_cat(grads_V), value.shape),
            None,
            None,
            None,
        )


def _empty(x: Tensor) -> Tensor:
    """Of the shape of `x`, contiguous also where that is not, so that its parts can be written into."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _probabilities(Q: Tensor, K: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """softmax(scale * Q K^T + bias), shape (G * K, H / K * b, L), in the dtype of `Q` (G, K, H / K * b, D)."""
    scores = torch.bmm(Q.flatten(0, 1), K.transpose(1, 2)).to(_wide(Q)).mul_(scale)
    if bias is not None:
        b, length = bias.shape[-2:]
        scores.view(len(Q), Q.shape[1], -1, b, length).add_(bias)
    return scores.softmax(-1).to(Q.dtype)


def _draw(P: Tensor, dropout: float) -> tuple[Tensor, float]:
    if fast(P):
        return kept(P, dropout)
    return torch.rand_like(P, dtype=torch.float32) >= dropout, 1 / (1 - dropout)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
