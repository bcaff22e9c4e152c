"""Subspace similarity of two adapters' directions: the paper's section 7.2 and Appendix G."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.analysis.deltas import (
    Delta,
    Factors,
    chosen,
    deltas_of,
    in_common,
    notices,
    pair_in_one_form,
    read_each,
)
from lorakit.analysis.thin_svd import change_directions, row_directions
from lorakit.errors import AdapterFileError, ConfigurationError


def subspace_similarity(A1: Tensor, A2: Tensor) -> Tensor:
    """Return ``phi(i, j) = ||U1_i^T U2_j||_F^2 / min(i, j)`` for i = 1 to r1 and j = 1 to r2 (paper, equation 4).

    ``U_i`` holds the i leading right singular vectors of a matrix (its directions in the input space). phi is 1 if
    one span contains the other, and 0 if they are orthogonal. Its expectation for two random matrices is
    ``max(i, j) / k`` (`random_level`).

    Args:
        A1: (r1, k). Pass ``B.T`` to compare output spaces.
        A2: (r2, k).

    Returns:
        (r1, r2), float64. NaN beyond the numerical rank of either matrix.

    Raises:
        ConfigurationError: The widths of the matrices differ, or one of them is zero.
    """
    if A1.ndim != 2 or A2.ndim != 2 or A1.shape[1] != A2.shape[1]:
        raise ConfigurationError(
            f"The matrices have shapes {tuple(A1.shape)} and {tuple(A2.shape)}; two matrices of the same "
            "width were expected, (r1, k) and (r2, k)."
        )
    phi = torch.full((A1.shape[0], A2.shape[0]), torch.nan, dtype=torch.float64)
    nonzero = similarity_of_directions(row_directions(A1), row_directions(A2))
    if not nonzero.numel():
        raise ConfigurationError(
            "A matrix is all zeros, so it has no directions: the adapter was never trained. Pass a trained one."
        )
    phi[: nonzero.shape[0], : nonzero.shape[1]] = nonzero
    return phi


def similarity_of_directions(V1: Tensor, V2: Tensor) -> Tensor:
    """Return ``phi(i, j)`` of two sets of orthonormal rows, (n1, k) and (n2, k): (n1, n2)."""
    overlap = (V1 @ V2.mT).square().cumsum(0).cumsum(1)
    i = torch.arange(1, V1.shape[0] + 1)[:, None]
    j = torch.arange(1, V2.shape[0] + 1)[None, :]
    return overlap / torch.minimum(i, j)


def random_level(rows: int, columns: int, width: int) -> Tensor:
    """Return the expected ``phi(i, j) = max(i, j) / k`` of random directions: (rows, columns), float64."""
    i = torch.arange(1, rows + 1, dtype=torch.float64)[:, None]
    j = torch.arange(1, columns + 1, dtype=torch.float64)[None, :]
    return torch.maximum(i, j) / width


@dataclass(frozen=True)
class Similarity:
    """Similarity of one factor (A or B) of one matrix in two adapters."""

    phi: Tensor = field(repr=False)
    """`subspace_similarity`, (r1, r2)."""
    width: int
    """Dimension k of the space of the directions."""

    @property
    def random(self) -> Tensor:
        """Expected phi of random directions, (r1, r2)."""
        rows, columns = self.phi.shape
        return random_level(rows, columns, self.width)

    @property
    def first(self) -> float:
        """phi(1, 1): agreement of the leading directions."""
        return float(self.phi[0, 0])

    @property
    def whole(self) -> float:
        """Phi of the two full spans."""
        return float(self.phi[~self.phi.isnan()][-1])

    @property
    def random_whole(self) -> float:
        """Expected `whole` of random directions."""
        return float(self.random[~self.phi.isnan()][-1])

    def to_json(self) -> dict[str, Any]:
        """Return all numbers as JSON values; None for NaN."""
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
    """Similarity of the matrices that two adapters share."""

    A: dict[str, Similarity]
    """Similarity of the input directions by name."""
    B: dict[str, Similarity]
    """Similarity of the output directions by name."""
    notices: list[str] = field(default_factory=list)

    @property
    def overall(self) -> dict[str, dict[str, float]]:
        """Medians over the matrices for A and for B: phi(1, 1), phi of the full spans, and their random levels."""
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
        """Return all numbers as JSON values."""
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
    """Return the similarity of two adapters (of other ranks, seeds or tasks), matrix by matrix.

    A and B of PiSSA are mostly directions of the base, from which they start. The directions of the change are
    compared instead.

    Args:
        first: A lorakit or PEFT folder, a loralib file, or an adapter already read.
        second: The second adapter, in any of these forms.
        alpha: alpha of loralib files, which do not record it.
        only: Regular expression that selects matrices by name; None selects all.

    Raises:
        AdapterFileError: One cannot be read, they have no matrix in common, or one was never trained.
        ConfigurationError: `only` is no regular expression, or matches no name.
    """
    stored = read_each([first, second], alpha)
    in_one_form, sentences = pair_in_one_form(*stored)
    one, other = (chosen(deltas_of(adapter), only) for adapter in in_one_form)
    shared, unshared = in_common(one, other)
    sentences += unshared
    for name in list(shared):
        if one[name].is_zero or other[name].is_zero:
            sentences.append(f"'{name}' is skipped: it is zero in one of the adapters.")
            shared.remove(name)
    if not shared:
        raise AdapterFileError(
            "All shared matrices are zero in one of the adapters, so there are no directions to compare. "
            "Name two trained adapters."
        )
    pissa = sum(_is_pissa(stored[0], one[n]) and _is_pissa(stored[1], other[n]) for n in shared)
    if pissa:
        sentences.append(
            f"{pissa} matrices of both adapters start from directions of the base (PiSSA). Their changes share these "
            "directions, whatever was learned."
        )
    pairs = {n: (_factors(stored[0], one[n]), _factors(stored[1], other[n])) for n in shared}
    return AdapterSimilarity(
        A={n: _similarity(A1, A2) for n, ((A1, _), (A2, _)) in pairs.items()},
        B={n: _similarity(B1.mT, B2.mT) for n, ((_, B1), (_, B2)) in pairs.items()},
        notices=list(dict.fromkeys((*sentences, *notices(stored[0]), *notices(stored[1])))),
    )


def _is_pissa(stored: StoredAdapter, delta: Delta) -> bool:
    return stored.layers[delta.path].initial_A is not None


def _factors(stored: StoredAdapter, delta: Delta) -> Factors:
    """Return A and B of a matrix; for PiSSA, factors of its change, without the start that both A and B contain."""
    if not _is_pissa(stored, delta):
        return delta.A, delta.B
    U, S, Vh = change_directions(delta.A, delta.B)
    return S[:, None] * Vh, U * S


def _similarity(A1: Tensor, A2: Tensor) -> Similarity:
    return Similarity(subspace_similarity(A1, A2), A1.shape[1])
