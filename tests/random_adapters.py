"""Randomise adapters: a new one has B = 0, which hides a missing or doubled effect."""

from __future__ import annotations

import torch

from lorakit.adapters import Adapters


def randomise(adapters: Adapters, *names: str, scale: float = 0.3, seed: int = 0) -> None:
    """Add noise to every trained tensor of the named adapters (default: all)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in names or adapters.names:
            for parameter in adapters.trainable_parameters(name):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += scale * noise.to(parameter.device)
