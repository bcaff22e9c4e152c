"""Adapters on a tiny model, and leases of them, without a store."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from random_adapters import randomise
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import lorakit
from lorakit.adapters.choice import Blend
from lorakit.serving.engine import Receipt


@dataclass
class PlainLease:
    """A lease of adapters that are attached already; their names are their digests."""

    blend: Blend
    tokenizer: PreTrainedTokenizerBase
    released: int = 0
    shared: list[PlainLease] = field(default_factory=list)

    task = outputs = None

    @property
    def receipt(self) -> Receipt:
        return Receipt("base", tuple((name, name, weight) for name, weight in self.blend))

    def share(self) -> PlainLease:
        self.shared.append(PlainLease(self.blend, self.tokenizer))
        return self.shared[-1]

    def release(self) -> None:
        self.released += 1


def attach_some(
    model: PreTrainedModel, names: str = "abc", targets: Any = "attention.qv", **settings: Any
) -> None:
    """Attach random adapters with these names."""
    for i, name in enumerate(names):
        method = lorakit.LoRA(rank=4, alpha=8, targets=targets, **settings)
        adapters = lorakit.attach(model, method, name=name)
        randomise(adapters, name, seed=i + 1)
        adapters.activate(None)
