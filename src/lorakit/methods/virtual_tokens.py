"""Virtual tokens: positions of a sequence whose vectors come from an adapter instead of the vocabulary.

`VirtualTokens.place` inserts them into the ids as numbers above any vocabulary, before the model reads the ids. The
model's positions, masks and caches then treat them like any token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

PREFIX_START, INFIX_START = 1_000_000, 2_000_000
"""Ids of the first prefix and the first infix token, as in the first release of the paper's code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtualTokens:
    """Numbers of virtual tokens in a sequence: before its prompt (prefix) and after it (infix)."""

    prefix: int = 0
    infix: int = 0

    @property
    def total(self) -> int:
        """Number of virtual tokens in a sequence."""
        return self.prefix + self.infix

    def place(
        self, values: Sequence[Any], *, keep: int = 0, prompt: int | None = None, fill: Any = None
    ) -> list[Any]:
        """Insert the virtual tokens into a list with one value for each token of a sequence.

        The prefix follows the first `keep` tokens, the infix the first `prompt` tokens:
        ``[bos, prefix, prompt, infix, completion]``.

        Args:
            values: Token ids, or other values for each token (labels, token types).
            keep: Number of tokens before the prefix: a bos or [CLS].
            prompt: Number of tokens of the prompt, including `keep`; None if the whole sequence is the prompt.
            fill: Value of the virtual tokens, for example -100 in labels; None inserts their ids.
        """
        prompt = len(values) if prompt is None else max(prompt, keep)
        prefix = [PREFIX_START + i if fill is None else fill for i in range(self.prefix)]
        infix = [INFIX_START + i if fill is None else fill for i in range(self.infix)]
        return [*values[:keep], *prefix, *values[keep:prompt], *infix, *values[prompt:]]


def virtual_tokens_of(methods: Iterable[object]) -> VirtualTokens:
    """Return the virtual tokens that the methods need in each sequence; none without a prefix method."""
    tokens = (getattr(method, "virtual_tokens", None) for method in methods)
    return next(filter(None, tokens), VirtualTokens())
