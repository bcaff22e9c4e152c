"""Singular values of an adapter's change ``scaling * B A``, and ranks derived from them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.adapters.formats.stored_layer import StoredLayer
from lorakit.analysis.deltas import deltas_of, notices, parts_of, read
from lorakit.analysis.thin_svd import singular_values
from lorakit.errors import ConfigurationError

ENERGY = 0.9
"""Default share of the squared norm that a suggested rank keeps."""

UNTRAINED = "The adapter is zero everywhere: it was never trained."
"""Printed if every B of an adapter is 0."""


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one change ``scaling * B A``, and the norms and ranks derived from them.

    All are 0 for an untrained adapter (B = 0).
    """

    singular_values: Tensor
    """(min(r, out, in),), descending, float64."""
    groups: int = 1
    """Groups that share the layer's rank, as those of a convolution. This is the change of one of them."""

    @property
    def rank(self) -> int:
        """The layer's rank that keeps all singular values."""
        return len(self.squares_by_rank)

    @property
    def squares_by_rank(self) -> Tensor:
        """Sum of the squares of the singular values that each rank of the layer adds, (rank,)."""
        ranks = (torch.arange(len(self.singular_values)) + 1) * self.groups
        squares = self.singular_values.square()
        return squares.new_zeros(int(ranks[-1])).index_add_(0, ranks - 1, squares)

    @property
    def norm(self) -> float:
        """Frobenius norm of the change."""
        return float(torch.linalg.vector_norm(self.singular_values))

    @property
    def effective_rank(self) -> float:
        """``exp(-sum p log p)`` with ``p = sigma / sum of sigma`` (Roy and Vetterli 2007), 1 to r."""
        total = self.singular_values.sum()
        if total == 0:
            return 0.0
        return float(torch.special.entr(self.singular_values / total).sum().exp())

    @property
    def stable_rank(self) -> float:
        """Squared Frobenius norm over squared spectral norm, 1 to r."""
        largest = self.singular_values[0]
        return 0.0 if largest == 0 else float((self.singular_values / largest).square().sum())

    @property
    def energy(self) -> Tensor:
        """Share of the squared norm that rank i of the layer keeps, for i = 1 to its rank: (rank,)."""
        return cumulative_share(self.squares_by_rank)

    def rank_for(self, energy: float) -> int:
        """Return the layer's smallest rank that keeps this share of the squared norm; 0 for an untrained adapter."""
        return rank_for(self.energy, energy)


def spectrum(A: Tensor, B: Tensor, scaling: float = 1.0) -> Spectrum:
    """Return the spectrum of ``scaling * B A``, computed from an r x r matrix.

    Args:
        A: (r, in).
        B: (out, r).
        scaling: Factor on the product, ``alpha / r``.

    Raises:
        ConfigurationError: A is not (r, in), or B is not (out, r).
    """
    return Spectrum(singular_values(A, B, scaling))


def layer_norm(layer: StoredLayer) -> float:
    """Return the Frobenius norm of a layer's change."""
    return math.hypot(*(spectrum(A, B, layer.scaling).norm for A, B in parts_of(layer)))


@dataclass(frozen=True, kw_only=True)
class AdapterSpectrum:
    """The spectra of an adapter's matrices."""

    layers: dict[str, Spectrum]
    """Spectra by name; a fused projection has one per adapted slice."""
    notices: list[str] = field(default_factory=list)

    @property
    def energy(self) -> Tensor:
        """Share of the whole adapter's squared norm that rank i keeps in every layer, for i = 1 to the highest."""
        squares = [layer.squares_by_rank for layer in self.layers.values()]
        total = torch.zeros(max(map(len, squares)), dtype=torch.float64)
        for one in squares:
            total[: len(one)] += one
        return cumulative_share(total)

    @property
    def norm(self) -> float:
        """Frobenius norm of all changes together."""
        return sum(layer.norm**2 for layer in self.layers.values()) ** 0.5

    def rank_for(self, energy: float) -> int:
        """Return the smallest common rank of all layers that keeps this share of the squared norm."""
        return rank_for(self.energy, energy)

    def to_json(self, energy: float = ENERGY) -> dict[str, Any]:
        """Return all numbers as JSON values; the suggested ranks keep the share `energy`."""
        return {
            "energy": energy,
            "overall": {
                "norm": self.norm,
                "energy_by_rank": self.energy.tolist(),
                "suggested_rank": self.rank_for(energy),
            },
            "layers": {
                name: {
                    "rank": layer.rank,
                    "singular_values": layer.singular_values.tolist(),
                    "norm": layer.norm,
                    "effective_rank": layer.effective_rank,
                    "stable_rank": layer.stable_rank,
                    "energy_by_rank": layer.energy.tolist(),
                    "suggested_rank": layer.rank_for(energy),
                }
                for name, layer in self.layers.items()
            },
            "notices": self.notices,
        }


def adapter_spectrum(
    adapter: StoredAdapter | str | Path, *, alpha: float | None = None
) -> AdapterSpectrum:
    """Return the spectra of all matrices of an adapter.

    Args:
        adapter: A lorakit or PEFT folder, a loralib file, or an adapter already read.
        alpha: alpha of a loralib file, which does not record it.

    Raises:
        AdapterFileError: The adapter cannot be read, or has no low-rank factors.
    """
    stored = read(adapter, alpha=alpha)
    layers = {}
    for name, delta in deltas_of(stored).items():
        form = stored.layers[delta.path].form
        values = singular_values(delta.A, delta.B, delta.scaling)
        layers[name] = Spectrum(values, groups=form.rank_groups)
    return AdapterSpectrum(layers=layers, notices=notices(stored))


def cumulative_share(values: Tensor) -> Tensor:
    """Return the cumulative sums of `values` (n,) divided by their total; zeros if the total is 0."""
    total = values.sum()
    return torch.zeros_like(values) if total == 0 else values.cumsum(0) / total


def rank_for(energy_by_rank: Tensor, energy: float) -> int:
    """Return the first rank i whose share ``energy_by_rank[i - 1]`` reaches `energy`.

    Raises:
        ConfigurationError: `energy` is not above 0 and at most 1.
    """
    require_share("energy", energy, "the share of the squared norm to keep", example=0.9)
    if energy_by_rank[-1] == 0:
        return 0
    # The tolerance covers rounding: the last share may be slightly below 1.
    return int((energy_by_rank < energy * (1 - 1e-12)).sum()) + 1


def require_share(name: str, value: float, meaning: str, *, example: float) -> None:
    """Raise a ConfigurationError unless the value of a setting is above 0 and at most 1."""
    if not 0 < value <= 1:
        raise ConfigurationError(
            f"{name} is {value!r}; it is {meaning}, above 0 and at most 1, for example {example}."
        )
