"""How much of one adapter's directions lies in another's: the paper's section 7.2 and Appendix G."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.analysis.deltas import chosen, deltas_of, in_common, notices, read
from lorakit.analysis.thin_svd import row_directions
from lorakit.errors import AdapterFileError, ConfigurationError


def subspace_similarity(A1: Tensor, A2: Tensor) -> Tensor:
    """``phi(i, j) = ||U1_i^T U2_j||_F^2 / min(i, j)`` for i = 1 to r1 and j = 1 to r2 (paper, equation 4).

    ``U_i`` holds the i leading right singular vectors of a matrix (its directions in the input space).
    1 means that one span contains the other, 0 that they are orthogonal; two random matrices are
    expected to give ``max(i, j) / k`` (`random_level`).

    Args:
        A1: (r1, k). For the output space give ``B.T``.
        A2: (r2, k).

    Returns:
        (r1, r2), float64. NaN beyond the numerical rank of either matrix, where there are no directions.

    Raises:
        ConfigurationError: The matrices have no common width, or one of them is zero.
    """
    if A1.ndim != 2 or A2.ndim != 2 or A1.shape[1] != A2.shape[1]:
        raise ConfigurationError(
            f"The matrices have shapes {tuple(A1.shape)} and {tuple(A2.shape)}; two matrices of the same "
            "width were expected, (r1, k) and (r2, k)."
        )
    phi = torch.full((A1.shape[0], A2.shape[0]), torch.nan, dtype=torch.float64)
    found = similarity_of_directions(row_directions(A1), row_directions(A2))
    if not found.numel():
        raise ConfigurationError(
            "A matrix is all zeros, so it has no directions: the adapter was never trained."
        )
    phi[: found.shape[0], : found.shape[1]] = found
    return phi


def similarity_of_directions(V1: Tensor, V2: Tensor) -> Tensor:
    """``phi(i, j)`` of two orthonormal sets of rows, (n1, k) and (n2, k): (n1, n2)."""
    overlap = (V1 @ V2.mT).square().cumsum(0).cumsum(1)
    i = torch.arange(1, V1.shape[0] + 1)[:, None]
    j = torch.arange(1, V2.shape[0] + 1)[None, :]
    return overlap / torch.minimum(i, j)


def random_level(rows: int, columns: int, width: int) -> Tensor:
    """The expected ``phi(i, j) = max(i, j) / k`` of random directions: (rows, columns), float64."""
    i = torch.arange(1, rows + 1, dtype=torch.float64)[:, None]
    j = torch.arange(1, columns + 1, dtype=torch.float64)[None, :]
    return torch.maximum(i, j) / width


@dataclass(frozen=True)
class Similarity:
    """phi of one factor of one matrix in two adapters."""

    phi: Tensor
    """(r1, r2)."""
    width: int
    """Dimension k of the space of the directions."""

    @property
    def random(self) -> Tensor:
        """What phi is expected to be for random directions, (r1, r2)."""
        rows, columns = self.phi.shape
        return random_level(rows, columns, self.width)

    @property
    def first(self) -> float:
        """phi(1, 1): whether the leading directions agree."""
        return float(self.phi[0, 0])

    @property
    def whole(self) -> float:
        """The two spans as wholes."""
        return float(self.phi[~self.phi.isnan()][-1])

    @property
    def random_whole(self) -> float:
        """What `whole` is expected to be for random directions."""
        return float(self.random[~self.phi.isnan()][-1])

    def to_json(self) -> dict[str, Any]:
        """All numbers as JSON values; None where there are no directions."""
        return {
            "width": self.width,
            "phi": [[None if x != x else x for x in row] for row in self.phi.tolist()],
            "phi_1_1": self.first,
            "phi_whole": self.whole,
            "random_1_1": 1 / self.width,
            "random_whole": self.random_whole,
        }


@dataclass(frozen=True, kw_only=True)
class AdapterSimilarity:
    """Similarity of the matrices that two adapters have in common."""

    A: dict[str, Similarity]
    """Of the input directions, by name."""
    B: dict[str, Similarity]
    """Of the output directions, by name."""
    notices: list[str] = field(default_factory=list)

    @property
    def overall(self) -> dict[str, dict[str, float]]:
        """The medians over the matrices, of A and of B.

        Of phi of the first directions, of phi of the spans as wholes, and of their random levels.
        """
        return {
            side: {
                "phi_1_1": median(one.first for one in layers.values()),
                "random_1_1": median(1 / one.width for one in layers.values()),
                "phi_whole": median(one.whole for one in layers.values()),
                "random_whole": median(one.random_whole for one in layers.values()),
            }
            for side, layers in (("A", self.A), ("B", self.B))
        }

    def to_json(self) -> dict[str, Any]:
        """All numbers as JSON values."""
        return {
            "overall": self.overall,
            "layers": {
                name: {"A": self.A[name].to_json(), "B": self.B[name].to_json()} for name in self.A
            },
            "notices": self.notices,
        }


def adapter_similarity(
    first: StoredAdapter | str | Path,
    second: StoredAdapter | str | Path,
    *,
    alpha: float | None = None,
    only: str | None = None,
) -> AdapterSimilarity:
    """Similarity of two adapters, ranks or seeds, matrix by matrix.

    Args:
        first: A folder of lorakit or PEFT, a loralib file, or an adapter that was read.
        second: The other one.
        alpha: The constant of loralib files, which do not record it.
        only: A regular expression found in the names of the matrices to look at; None looks at all.

    Raises:
        AdapterFileError: One cannot be read, or they have no matrix in common.
    """
    stored = read(first, alpha=alpha), read(second, alpha=alpha)
    one, other = (chosen(deltas_of(adapter), only) for adapter in stored)
    shared, found = in_common(one, other)
    for name in list(shared):
        untrained = [d for d in (one[name], other[name]) if not d.A.any() or not d.B.any()]
        if untrained:
            found.append(f"'{name}' is left out: one of the adapters is zero there.")
            shared.remove(name)
    if not shared:
        raise AdapterFileError("One of the adapters is zero everywhere: it was never trained.")
    return AdapterSimilarity(
        A={n: _similarity(one[n].A, other[n].A) for n in shared},
        B={n: _similarity(one[n].B.mT, other[n].B.mT) for n in shared},
        notices=list(dict.fromkeys((*found, *notices(stored[0]), *notices(stored[1])))),
    )


def _similarity(A1: Tensor, A2: Tensor) -> Similarity:
    return Similarity(subspace_similarity(A1, A2), A1.shape[1])
