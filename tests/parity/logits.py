"""Comparing logits, and the random tensors that make the comparison mean something."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

TOLERANCE = 1e-5
"""Largest difference of two float32 computations of the same logits."""
ACTS = 1e-2
"""A smaller difference from the base's logits could hide that an adapter does nothing."""


def assert_same(a: Tensor, b: Tensor, tolerance: float = TOLERANCE) -> None:
    largest = (a - b).abs().max().item()
    assert largest <= tolerance, f"they differ by {largest:.3g}"  # also where it is NaN


def assert_differ(a: Tensor, b: Tensor) -> None:
    largest = (a - b).abs().max().item()
    assert largest > ACTS, f"they differ by no more than {largest:.3g}"


@torch.no_grad()
def randomise(parameters: Iterable[Tensor], seed: int) -> None:
    """Move every tensor by random numbers, so that none is zero or lost unnoticed.

    Vectors (biases, norms, magnitudes) move less: a norm of opposite sign would be another model.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        parameter.add_(noise * (0.2 if parameter.squeeze().ndim > 1 else 0.1))
        assert parameter.count_nonzero() == parameter.numel()
