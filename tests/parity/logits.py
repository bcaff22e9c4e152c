"""Compare logits, and randomise tensors so that the comparison is meaningful."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

TOLERANCE = 1e-5
"""Maximum difference of two float32 computations of the same logits."""
ACTS = 1e-2
"""Minimum difference from the base's logits, to show that an adapter has an effect."""


def assert_same(a: Tensor, b: Tensor, tolerance: float = TOLERANCE) -> None:
    largest = (a - b).abs().max().item()
    assert largest <= tolerance, f"they differ by {largest:.3g}"  # also fails for NaN


def assert_differ(a: Tensor, b: Tensor) -> None:
    largest = (a - b).abs().max().item()
    assert largest > ACTS, f"they differ by no more than {largest:.3g}"


@torch.no_grad()
def randomise(parameters: Iterable[Tensor], seed: int) -> None:
    """Add noise to every tensor, so that none is zero and a lost one changes the output.

    Vectors (biases, norms, magnitudes) get less noise: a norm with the opposite sign changes the model too much.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        parameter.add_(noise * (0.2 if parameter.squeeze().ndim > 1 else 0.1))
        assert parameter.count_nonzero() == parameter.numel()
