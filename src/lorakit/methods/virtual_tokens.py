"""Virtual tokens: places of a sequence whose vectors an adapter gives, not the vocabulary.

They stand in the ids as numbers above any vocabulary, put there before the model sees the ids (`VirtualTokens.place`).
Positions, masks and caches then treat them as the tokens they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
