"""Virtual tokens: places of a sequence whose vectors an adapter gives, not the vocabulary.

They stand in the ids as numbers above any vocabulary, put there before the model sees the ids (`VirtualTokens.place`).
Positions, masks and caches then treat them as the tokens they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PREFIX_START, INFIX_START = 1_000_000, 2_000_000
"""Ids of the first prefix and the first infix token, as in the first release of the paper's code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtualTokens:
    """How many virtual tokens a sequence takes: before its prompt (prefix) and after it (infix)."""

    prefix: int = 0
    infix: int = 0

    @property
    def total(self) -> int:
        """Tokens by which they lengthen a sequence."""
        return self.prefix + self.infix

    def place(
        self, values: Sequence[Any], *, keep: int = 0, prompt: int | None = None, fill: Any = None
    ) -> list[Any]:
        """Return one value for each token of a sequence, with the virtual tokens put in.

        The prefix stands after the first `keep` tokens, the infix after the first `prompt`:
        ``[bos, prefix, prompt, infix, completion]``.

        Args:
            values: Token ids, or anything else that has one value for each token (labels, types).
            keep: Tokens that stay in front of the prefix: a bos or [CLS].
            prompt: Tokens of the prompt, `keep` included; None where the whole sequence is one.
            fill: The virtual tokens' value, for example -100 in labels; None puts in their ids.
        """
        prompt = len(values) if prompt is None else max(prompt, keep)
        prefix = [PREFIX_START + i if fill is None else fill for i in range(self.prefix)]
        infix = [INFIX_START + i if fill is None else fill for i in range(self.infix)]
        return [*values[:keep], *prefix, *values[keep:prompt], *infix, *values[prompt:]]


@dataclass(frozen=True, slots=True)
class VirtualPositions:
    """Where the virtual tokens of a batch of ids (B, T) stand, N in all."""

    ids: Tensor
    """The ids, shape (B, T); virtual are those of `PREFIX_START` and above."""
    rows: Tensor | None = None
    """Row of each virtual token, shape (N,); None in a compiled graph, whose shapes depend on no data."""
    columns: Tensor | None = None
    """Column of each, shape (N,)."""

    @classmethod
    def of(cls, ids: Tensor) -> VirtualPositions:
        """Find them in `ids`."""
        if torch.compiler.is_compiling():
            return cls(ids)
        return cls(ids, *(ids >= PREFIX_START).nonzero(as_tuple=True))

    def among(self, rows: Sequence[int]) -> VirtualPositions:
        """Return those of some rows alone, still counted in the whole batch."""
        chosen = torch.zeros(len(self.ids), 1, dtype=torch.bool, device=self.ids.device)
        chosen[list(rows)] = True
        return VirtualPositions.of(self.ids.masked_fill(~chosen, 0))

    def put(self, hidden: Tensor, vectors: Tensor, prefix: int) -> Tensor:
        """Return `hidden` (B, T, d) with the rows of `vectors` at the virtual tokens.

        Args:
            hidden: What stands there.
            vectors: Shape (prefix + infix, d), in any dtype.
            prefix: How many of them are the prefix's.
        """
        ids = self.ids.to(vectors.device)
        if self.rows is None or self.columns is None:
            which = _index(ids, prefix).clamp(0, len(vectors) - 1)
            is_virtual = (ids >= PREFIX_START).unsqueeze(-1).to(hidden.device)
            return torch.where(is_virtual, vectors[which].to(hidden.device, hidden.dtype), hidden)
        which = _index(ids[self.rows, self.columns], prefix)
        place = (self.rows.to(hidden.device), self.columns.to(hidden.device))
        return hidden.index_put(place, vectors[which].to(hidden.device, hidden.dtype))


def _index(ids: Tensor, prefix: int) -> Tensor:
    """The row of each virtual token in a table that begins with the prefix."""
    return torch.where(ids >= INFIX_START, ids - INFIX_START + prefix, ids - PREFIX_START)
