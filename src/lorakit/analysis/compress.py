"""Compression of an adapter to a smaller rank, by the singular value decomposition of each change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.adapters.formats.stored_layer import StoredLayer
from lorakit.analysis.deltas import (
    Factors,
    notices,
    parts_of,
    read,
    with_parts,
)
from lorakit.analysis.derived import Derived, LayerResult, derive, require_low_rank
from lorakit.analysis.leading import leading_svd
from lorakit.analysis.spectrum import cumulative_share, rank_for, require_share
from lorakit.analysis.thin_svd import thin_svd
from lorakit.configuration import is_whole
from lorakit.errors import ConfigurationError
from lorakit.ops.autocast import wide_dtype


class Decomposition(NamedTuple):
    """``U diag(S) Vh`` of a matrix, complete or leading part."""

    U: Tensor
    """(out, n)."""
    S: Tensor
    """(n,), descending."""
    Vh: Tensor
    """(n, in)."""
    missing: float = 0.0
    """Frobenius norm of the matrix minus ``U diag(S) Vh``."""

    @property
    def norm(self) -> float:
        """Frobenius norm of the whole matrix."""
        return math.hypot(float(torch.linalg.vector_norm(self.S)), self.missing)

    def rank_for(self, energy: float) -> int:
        """Return the smallest rank that keeps this share of the squared norm, at least 1."""
        return max(1, rank_for(cumulative_share(self.S.double().square()), energy))

    def residual(self, rank: int) -> float:
        """Return the Frobenius norm of the matrix minus its approximation of this rank."""
        return math.hypot(float(torch.linalg.vector_norm(self.S[rank:])), self.missing)

    def factors(self, rank: int, dtype: torch.dtype = torch.float32) -> Factors:
        """Return ``A = S^(1/2) Vh`` (rank, in) and ``B = U S^(1/2)`` (out, rank), padded with zeros."""
        root = self.S[:rank].sqrt()
        A, B = root[:, None] * self.Vh[:rank], self.U[:, :rank] * root
        padding = rank - len(root)
        return F.pad(A, (0, 0, 0, padding)).to(dtype), F.pad(B, (0, padding)).to(dtype)

    def truncate(
        self, rank: int | None, energy: float | None, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor, float]:
        """Return `factors` of this rank, or of the rank that keeps this energy, and their relative error."""
        if rank is None:
            assert energy is not None
            rank = self.rank_for(energy)
        rank = min(rank, len(self.S))
        error = self.residual(rank) / self.norm if self.norm else 0.0
        return *self.factors(rank, dtype), error


def compress(
    A: Tensor,
    B: Tensor,
    scaling: float = 1.0,
    *,
    rank: int | None = None,
    energy: float | None = None,
) -> tuple[Tensor, Tensor, float]:
    """Return the best approximation of ``scaling * B A`` (in Frobenius and spectral norm) of a smaller rank.

    The new factors include the scaling: ``B = U S^(1/2)``, ``A = S^(1/2) V^T``.

    Args:
        A: (r, in).
        B: (out, r).
        scaling: Factor on the product.
        rank: Maximum rank. Give rank or energy.
        energy: Minimum share of the squared norm to keep.

    Returns:
        A (k, in) and B (out, k) in float32 (or wider), and the relative error in the Frobenius norm.

    Raises:
        ConfigurationError: Not exactly one of rank and energy is given, or it is out of range.
    """
    check_target(rank, energy)
    return Decomposition(*thin_svd(A, B, scaling)).truncate(rank, energy, wide_dtype(A, B))


def decompose(matrix: Tensor, rank: int | None) -> Decomposition:
    """Decompose a dense matrix (out, in), completely or into its `rank` leading singular vectors."""
    U, S, Vh = leading_svd(matrix, min(matrix.shape) if rank is None else rank)
    missing = torch.linalg.vector_norm(matrix.to(U.dtype) - (U * S) @ Vh, dtype=torch.float64)
    return Decomposition(U, S, Vh, float(missing))


def fit(
    layer: StoredLayer,
    changes: Sequence[Decomposition],
    *,
    rank: int | None = None,
    energy: float | None = None,
) -> tuple[StoredLayer, LayerResult]:
    """Return the layer with factors for these changes of its parts, at a common rank.

    Args:
        layer: Layer of the same kind and widths.
        changes: One change for each of its parts (`parts_of`).
        rank: Maximum rank of the layer. Give rank or energy.
        energy: Minimum share of each part's squared norm to keep.

    Returns:
        The layer, and its rank and error.
    """
    if rank is None:
        assert energy is not None
        k = max(change.rank_for(energy) for change in changes)
    else:
        k = min(layer.form.part_rank(rank), max(len(change.S) for change in changes))
    fitted = with_parts(layer, [change.factors(k, wide_dtype(layer.A)) for change in changes])
    return fitted, LayerResult(
        rank=fitted.rank,
        norm=math.hypot(*(change.norm for change in changes)),
        residual=math.hypot(*(change.residual(k) for change in changes)),
    )


def compress_adapter(
    adapter: StoredAdapter | str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    alpha: float | None = None,
) -> Derived:
    """Return an adapter with every matrix reduced to a rank, or to the rank that keeps a share of its squared norm.

    A layer whose rank is already small enough stays bit-identical. The slices of a fused projection, or the groups
    of a convolution, share the largest rank that one of them needs.

    Args:
        adapter: A lorakit or PEFT folder, a loralib file, or an adapter already read.
        rank: Maximum rank. Give rank or energy.
        energy: Minimum share of each matrix's squared norm to keep.
        alpha: alpha of a loralib file, which does not record it.

    Raises:
        AdapterFileError: The adapter cannot be read, or has no low-rank factors.
        ConfigurationError: Not exactly one of rank and energy is given, or it is out of range.
    """
    check_target(rank, energy)
    stored = read(adapter, alpha=alpha)
    require_low_rank(stored)
    return compress_layers(stored, rank, energy, notices(stored))


def compress_layers(
    stored: StoredAdapter, rank: int | None, energy: float | None, notices: list[str]
) -> Derived:
    """Return the adapter with every layer reduced to a rank or an energy, and these notices."""
    layers, results = {}, {}
    for path, layer in stored.layers.items():
        parts = parts_of(layer)
        changes = [Decomposition(*thin_svd(A, B, layer.scaling)) for A, B in parts]
        smaller, result = fit(layer, changes, rank=rank, energy=energy)
        # Keep a layer bit-identical if its rank does not fall.
        if parts_of(smaller)[0][0].shape[0] >= parts[0][0].shape[0]:
            smaller, result = layer, replace(result, rank=layer.rank, residual=0.0)
        layers[path], results[path] = smaller, result
    return Derived(adapter=derive(stored, layers), layers=results, notices=notices)


def check_target(rank: int | None, energy: float | None) -> None:
    """Raise a ConfigurationError unless either rank or energy is given, and in range."""
    if (rank is None) == (energy is None):
        given = "neither is" if rank is None else "both are"
        raise ConfigurationError(
            f"rank and energy: {given} given. Set rank, or energy, the share of the squared norm to keep."
        )
    if rank is not None and (not is_whole(rank) or rank < 1):
        raise ConfigurationError(f"rank is {rank!r}; it must be a whole number of 1 or more.")
    if energy is not None:
        require_share("energy", energy, "the share of the squared norm to keep", example=0.9)
