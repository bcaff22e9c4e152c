"""Settings of the methods that the paper compares, by dotted name."""

from __future__ import annotations

from typing import Any


def lora(rank: int, *targets: str, alpha: float = 16.0) -> dict[str, Any]:
    """Return the settings of LoRA on these target roles."""
    return {"method": "lora", "lora.rank": rank, "lora.alpha": alpha, "lora.targets": targets}


def bottleneck(kind: str, size: int) -> dict[str, Any]:
    """Return the settings of bottleneck adapters."""
    return {"method": "bottleneck", "bottleneck.kind": kind, "bottleneck.size": size}


def prefix(method: str, length: int, infix: int) -> dict[str, Any]:
    """Return the settings of prefix_embedding or prefix_layer."""
    return {
        "method": method,
        f"{method}.prefix_length": length,
        f"{method}.infix_length": infix,
    }
