"""Adapters that were calculated from others: their settings, and how exact they are."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.adapters.formats.stored_layer import StoredLayer
from lorakit.errors import AdapterFileError
from lorakit.methods.lora import LoRA

KEPT = ("task", "labels", "peft", "data")
"""What is known of the original that holds of the result too."""


@dataclass(frozen=True, kw_only=True)
class LayerResult:
    """What a calculation did to one layer."""

    rank: int
    """Rank of the result."""
    norm: float
    """Frobenius norm of the change that the result stands for."""
    residual: float
    """Frobenius norm of what the result leaves out of it."""

    @property
    def error(self) -> float:
        """The residual as a share of the norm."""
        return self.residual / self.norm if self.norm else 0.0


@dataclass(frozen=True, kw_only=True)
class Derived:
    """An adapter calculated from others, and how exact it is."""

    adapter: StoredAdapter
    layers: dict[str, LayerResult]
    """By path."""
    notices: list[str] = field(default_factory=list)

    @property
    def error(self) -> float:
        """What all layers leave out, as a share of the whole change, both as Frobenius norms."""
        norm = math.hypot(*(layer.norm for layer in self.layers.values()))
        return (
            math.hypot(*(layer.residual for layer in self.layers.values())) / norm if norm else 0.0
        )

    def to_json(self) -> dict[str, Any]:
        """All numbers as JSON values."""
        return {
            "parameters": self.adapter.parameters,
            "error": self.error,
            "layers": {
                path: {**vars(layer), "error": layer.error} for path, layer in self.layers.items()
            },
            "notices": self.notices,
        }


def derive(original: StoredAdapter, layers: Mapping[str, StoredLayer]) -> StoredAdapter:
    """`original` with other layers, its settings brought in line with them.

    What the original records of its making no longer holds, apart from its task and data: `save` adds
    what does.
    """
    # alpha / rank is the scaling of every layer, whichever rule made it.
    layers = {
        path: dataclasses.replace(layer, alpha=layer.scaling * layer.rank)
        for path, layer in layers.items()
    }
    assert isinstance(original.method, LoRA)
    (rank, alpha), _ = Counter((layer.rank, layer.alpha) for layer in layers.values()).most_common(
        1
    )[0]
    starts = any(layer.initial_A is not None for layer in layers.values())
    method = dataclasses.replace(
        original.method,
        rank=rank,
        alpha=alpha,
        targets=original.method.targets
        if layers.keys() == original.layers.keys()
        else tuple(layers),
        scaling="standard",
        init=original.method.init if starts or original.method.init != "pissa" else "kaiming",
        rank_pattern={p: layer.rank for p, layer in layers.items() if layer.rank != rank},
        alpha_pattern={p: layer.alpha for p, layer in layers.items() if layer.alpha != alpha},
    )
    return StoredAdapter(
        method=method,
        layers=layers,
        trained=dict(original.trained),
        base=original.base,
        provenance={k: v for k, v in original.provenance.items() if k in KEPT},
    )


def require_known(stored: StoredAdapter) -> None:
    """Refuse an adapter whose meaning only its base can settle.

    Raises:
        AdapterFileError: It has no low-rank factors, or copies of base weights that may have been trained.
    """
    if not stored.layers or stored.modules or not isinstance(stored.method, LoRA):
        raise AdapterFileError(
            f"This adapter ({type(stored.method).__name__}) is not of low-rank factors, with which alone lorakit "
            "calculates. lorakit extract makes some from a fully fine-tuned model."
        )
    if stored.base_copies:
        raise AdapterFileError(
            f"The file brings base weights along ('{next(iter(stored.base_copies))}'), which may have been trained "
            "or not: only the base can tell. Load the adapter on its base with lorakit.load and save it again."
        )
