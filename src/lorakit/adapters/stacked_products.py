"""Batched products over stacked matrices: which tokens each computes, and their results.

Two products compute all tokens of a batch, each with its own blend: one for the blends with few tokens, and one, in the
dtype of the input, for those with many. Tokens are gathered and selected, never masked by a product: NaN of one adapter
stays in its tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lorakit.adapters.choice import Blend, Entries, take

MANY_TOKENS = 8
"""Tokens of a blend from which a product in the dtype of the input is faster. With 128 tokens of each of two blends, a
bfloat16 product takes half as long as one in float32; with one token of each of eight, twice as long."""


class Part(NamedTuple):
    """What a step computes for one layer."""

    matrices: list[tuple[Tensor, Tensor]]
    """A (in, rank) and B (rank, out) of the adapters of all tokens; if these differ in adapters, (tiles, in, rank) and
    (tiles, rank, out) for each product."""
    input_dtype: torch.dtype
    """The widest dtype of an input that loses nothing."""
    tokens: Tensor | None
    """Mask of the tokens with adapters on this layer, shape (batch, length, 1); None is all."""


class Product(NamedTuple):
    """One batched product, by indices on one device."""

    slots: Entries
    """The slot of each tile."""
    tokens: Entries
    """The token that each row reads, tile after tile."""
    is_narrow: bool
    """Whether it computes in the dtype of the input."""


class Rows(NamedTuple):
    """The products of a batch on one device, and the index that selects the tokens' results from their rows."""

    products: tuple[Product, ...]
    select: Tensor | None
    """The row with the result of each token; None if these are all rows in order."""


class Tiles(NamedTuple):
    """The tokens of one batched product, in tiles of the same length."""

    slots: list[int]
    """The slot of each tile."""
    tokens: list[int | None]
    """The token that each row computes; None in rows that fill up a tile, whose result is not read."""
    is_narrow: bool


def tiles_of(tokens: dict[Blend, list[int]], slots: dict[Blend, int]) -> list[Tiles]:
    """Return the tiles of the blends with few tokens and of those with many; `slots` are those of the blends."""
    few = {slots[blend]: own for blend, own in tokens.items() if len(own) < MANY_TOKENS}
    many = {blend: own for blend, own in tokens.items() if len(own) >= MANY_TOKENS}
    found = []
    if few:
        # All slots up to the last one are a view, also those in between that compute nothing.
        rows = max(map(len, few.values()))
        numbers = [*range(max(few) + 1)]
        padded = [t for slot in numbers for t in _padded(few.get(slot, []), rows)]
        found.append(Tiles(numbers, padded, is_narrow=False))
    if many:
        tiles, rows = _split(many)
        padded = [t for _, tile in tiles for t in _padded(tile, rows)]
        found.append(Tiles([slots[blend] for blend, _ in tiles], padded, is_narrow=True))
    return found


def _padded(tokens: list[int], rows: int) -> list[int | None]:
    """Return the tokens of a tile's rows."""
    return [*tokens, *[None] * (rows - len(tokens))]


def _split(tokens: dict[Blend, list[int]]) -> tuple[list[tuple[Blend, list[int]]], int]:
    """Split the tokens of each blend into tiles of at most some length; return them and that length.

    Shorter tiles are padded later. So a blend with far more tokens than the mean has several tiles.
    """
    longest = max(map(len, tokens.values()))
    mean = math.ceil(sum(map(len, tokens.values())) / len(tokens))
    rows = min(longest, 2 * mean)
    tiles = [
        (blend, own[i : i + rows])
        for blend, own in tokens.items()
        for i in range(0, len(own), rows)
    ]
    return tiles, rows


def rows_of(tiles: list[Tiles], size: int, device: torch.device) -> Rows:
    """Return the products of a batch of `size` tokens on a device."""
    products = tuple(
        Product(
            _index(own.slots, device), _index([t or 0 for t in own.tokens], device), own.is_narrow
        )
        for own in tiles
    )
    computed = [token for own in tiles for token in own.tokens]
    if computed == [*range(size)]:
        return Rows(products, None)
    select = [0] * size  # a token without adapters ignores what it reads
    for row, token in enumerate(computed):
        if token is not None:
            select[token] = row
    return Rows(products, torch.tensor(select, device=device))


def _index(numbers: Sequence[int], device: torch.device) -> Entries:
    """Return an index of these numbers: a slice if they are consecutive."""
    whole = range(numbers[0], numbers[0] + len(numbers))
    if [*numbers] == [*whole]:
        return slice(whole.start, whole.stop)
    return torch.tensor(numbers, device=device)


class SharedInput:
    """One input (..., in) of several layers, such as q, k and v, whose rows are gathered once for all of them."""

    def __init__(self, x: Tensor, rows: dict[torch.device, Rows] | None) -> None:
        self._x, self._of_device = x, rows
        self._rows: dict[tuple[int, torch.dtype], Tensor] = {}

    def delta(self, part: Part, dtype: torch.dtype) -> Tensor:
        """Return the sum of the low-rank products to add to a layer's output, shape (..., out)."""
        A, B = part.matrices[0]
        if self._of_device is None:
            return (self._x.to(A.dtype) @ A @ B).to(dtype)
        products, select = self._of_device[A.device]
        deltas = [
            torch.bmm(torch.bmm(self._gathered(product.tokens, A), A), B).flatten(0, 1).to(dtype)
            for product, (A, B) in zip(products, part.matrices, strict=True)
        ]
        total = torch.cat(deltas) if len(deltas) > 1 else deltas[0]
        total = total if select is None else total.index_select(0, select)
        return total.view(*self._x.shape[:-1], B.shape[-1])

    def _gathered(self, tokens: Entries, A: Tensor) -> Tensor:
        """Return the tokens' input of a product with A (tiles, in, rank), shape (tiles, rows, in)."""
        key = id(tokens), A.dtype
        x = self._rows.get(key)
        if x is None:
            x = take(self._x.flatten(0, -2), tokens).to(A.dtype)
            x = self._rows[key] = x.view(len(A), -1, x.shape[-1])
        return x
