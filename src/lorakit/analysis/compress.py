"""An adapter at a smaller rank: the best approximation of each change, by the decomposition of its factors."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    part_rank,
    parts_of,
    rank_unit,
    read,
    with_parts,
)
from lorakit.analysis.derived import Derived, LayerResult, derive, require_known
from lorakit.analysis.leading import leading_svd
from lorakit.analysis.spectrum import check_energy, cumulative_share, rank_for
from lorakit.analysis.thin_svd import thin_svd
from lorakit.errors import ConfigurationError


class Decomposition(NamedTuple):
    """``U diag(S) Vh``, all of a matrix or its leading part."""

    U: Tensor
    """(out, n)."""
    S: Tensor
    """(n,), descending."""
    Vh: Tensor
    """(n, in)."""
    missing: float = 0.0
    """Frobenius norm of the part that was not decomposed."""

    @property
    def norm(self) -> float:
        """Frobenius norm of the whole matrix."""
        return math.hypot(float(torch.linalg.vector_norm(self.S)), self.missing)

    def rank_for(self, energy: float) -> int:
        """The smallest rank that keeps this share of the squared norm, at least 1."""
        return max(1, rank_for(cumulative_share(self.S.double().square()), energy))

    def residual(self, rank: int) -> float:
        """Frobenius norm of what a cut to this rank leaves out."""
        return math.hypot(float(torch.linalg.vector_norm(self.S[rank:])), self.missing)

    def factors(self, rank: int, dtype: torch.dtype = torch.float32) -> Factors:
        """A (rank, in) and B (out, rank) that share the singular values evenly, zeros beyond their number."""
        root = self.S[:rank].sqrt()
        A, B = root[:, None] * self.Vh[:rank], self.U[:, :rank] * root
        lacking = rank - len(root)
        return F.pad(A, (0, 0, 0, lacking)).to(dtype), F.pad(B, (0, lacking)).to(dtype)


def compress(
    A: Tensor,
    B: Tensor,
    scaling: float = 1.0,
    *,
    rank: int | None = None,
    energy: float | None = None,
) -> tuple[Tensor, Tensor, float]:
    """The best approximation of ``scaling * B A`` (in Frobenius and spectral norm) of a smaller rank.

    The new factors hold the scaling and share the singular values evenly: ``B = U S^(1/2)``,
    ``A = S^(1/2) V^T``.

    Args:
        A: (r, in).
        B: (out, r).
        scaling: Factor on the product.
        rank: The rank to cut to; one of the two is given.
        energy: The share of the squared norm to keep at least.

    Returns:
        A (k, in), B (out, k) in float32 (or wider), and the error: the Frobenius norm of what is left out, as
        a share of the whole.

    Raises:
        ConfigurationError: Not exactly one of rank and energy is given, or it is out of range.
    """
    check_target(rank, energy)
    found = Decomposition(*thin_svd(A, B, scaling))
    k = min(found.rank_for(energy) if rank is None else rank, len(found.S))  # type: ignore[arg-type]
    dtype = torch.promote_types(torch.promote_types(A.dtype, B.dtype), torch.float32)
    error = found.residual(k) / found.norm if found.norm else 0.0
    return *found.factors(k, dtype), error


def decompose(matrix: Tensor, rank: int | None) -> Decomposition:
    """A whole matrix (out, in), all of it or its `rank` leading parts."""
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
    """The layer with factors for these changes of its parts, at a common rank.

    Args:
        layer: Says the kind and the widths.
        changes: One for each of its parts (`parts_of`).
        rank: The layer's rank, or its width where that is less; one of the two is given.
        energy: The share of each part's squared norm to keep at least.

    Returns:
        The layer, and what it leaves out of the changes.
    """
    unit = rank_unit(layer)
    if rank is None:
        assert energy is not None
        k = max(change.rank_for(energy) for change in changes)
    else:
        k = min(part_rank(layer, rank), max(len(change.S) for change in changes))
    k = -(-k // unit) * unit
    dtype = torch.promote_types(layer.A.dtype, torch.float32)
    fitted = with_parts(layer, [change.factors(k, dtype) for change in changes])
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
    """An adapter with every matrix cut to a rank, or to the rank that keeps a share of its squared norm.

    A layer whose rank is already as small stays bit for bit. The slices of a fused projection, and the
    groups of a convolution, keep one rank: the largest that one of them needs.

    Args:
        adapter: A folder of lorakit or PEFT, a loralib file, or an adapter that was read.
        rank: The rank to cut to; one of the two is given.
        energy: The share of the squared norm of each matrix to keep at least.
        alpha: The constant of a loralib file, which does not record it.

    Raises:
        AdapterFileError: The adapter cannot be read, or has no low-rank factors.
        ConfigurationError: Not exactly one of rank and energy is given, or it is out of range.
    """
    check_target(rank, energy)
    stored = read(adapter, alpha=alpha)
    require_known(stored)
    layers, results = {}, {}
    for path, layer in stored.layers.items():
        layers[path], results[path] = compress_layer(layer, rank=rank, energy=energy)
    return Derived(adapter=derive(stored, layers), layers=results, notices=notices(stored))


def compress_layer(
    layer: StoredLayer, *, rank: int | None = None, energy: float | None = None
) -> tuple[StoredLayer, LayerResult]:
    """One layer cut to a rank or an energy; as it is where that is no less than its rank."""
    parts = parts_of(layer)
    changes = [Decomposition(*thin_svd(A, B, layer.scaling)) for A, B in parts]
    smaller, result = fit(layer, changes, rank=rank, energy=energy)
    if parts_of(smaller)[0][0].shape[0] >= parts[0][0].shape[0]:
        return layer, LayerResult(rank=layer.rank, norm=result.norm, residual=0.0)
    return smaller, result


def check_target(rank: int | None, energy: float | None) -> None:
    """Refuse anything but one of the two ways to say how small a result is to be.

    Raises:
        ConfigurationError: None or both are given, or one is out of range.
    """
    if (rank is None) == (energy is None):
        found = "neither is" if rank is None else "both are"
        raise ConfigurationError(
            f"Give rank or energy, the share of the squared norm to keep; {found} given."
        )
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ConfigurationError(f"rank is {rank!r}; it must be a whole number of 1 or more.")
    if energy is not None:
        check_energy(energy)
