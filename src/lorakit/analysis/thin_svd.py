"""The singular value decomposition of ``B A`` from its thin factors, never from the product.

With ``B = Q_B R_B`` and ``A^T = Q_A R_A``, the singular values of ``B A = Q_B (R_B R_A^T) Q_A^T`` are
those of an r x r matrix. All of it is computed in float64, whatever the factors' dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.errors import ConfigurationError

_NEARLY_DEPENDENT = 1e-5
"""Ratio of Cholesky's pivots; down to it the error stays below 1e-10 of the norm."""


def singular_values(A: Tensor, B: Tensor, scaling: float = 1.0) -> Tensor:
    """Singular values of ``scaling * B A``, descending: float64, (min(r, out, in),).

    Args:
        A: (r, in).
        B: (out, r).
        scaling: Factor on the product.

    Raises:
        ConfigurationError: The shapes do not form a product.
    """
    check_factors(A, B)
    return abs(scaling) * torch.linalg.svdvals(triangular(B) @ triangular(A.mT).mT)


def thin_svd(A: Tensor, B: Tensor, scaling: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """``U`` (out, k), ``S`` (k,) and ``Vh`` (k, in) with ``scaling * B A = U diag(S) Vh``, in float64.

    k is r, or the width of the product where that is less.

    Raises:
        ConfigurationError: The shapes do not form a product.
    """
    check_factors(A, B)
    Q_B, R_B = torch.linalg.qr(B.double())
    Q_A, R_A = torch.linalg.qr(A.double().mT)
    U, S, Vh = torch.linalg.svd(scaling * (R_B @ R_A.mT), full_matrices=False)
    return Q_B @ U, S, Vh @ Q_A.mT


def row_directions(A: Tensor) -> Tensor:
    """Right singular vectors of A (r, in) that belong to nonzero singular values, as rows: (rank of A, in).

    A singular value within the rounding of A's numbers counts as zero: its direction is arbitrary.
    """
    Q, R = torch.linalg.qr(A.double().mT)
    P, S, _ = torch.linalg.svd(R, full_matrices=False)
    rounding = torch.finfo(A.dtype).eps * torch.linalg.vector_norm(S)
    return (Q @ P[:, rounding < S]).mT


def change_directions(A: Tensor, B: Tensor, scaling: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """`thin_svd` without the singular values that rounding the factors to their dtype could have made.

    Raises:
        ConfigurationError: The shapes do not form a product, or the product is zero.
    """
    U, S, Vh = thin_svd(A, B, scaling)
    norms = torch.linalg.vector_norm(A.double()) * torch.linalg.vector_norm(B.double())
    kept = abs(scaling) * torch.finfo(A.dtype).eps * norms < S
    if not kept.any():
        raise ConfigurationError(
            "B A is zero, so it has no directions: the adapter was never trained."
        )
    return U[:, kept], S[kept], Vh[kept]


def triangular(M: Tensor) -> Tensor:
    """R of ``M = Q R`` for a tall M (m, r), up to the signs of its rows, in float64.

    R is the Cholesky factor of ``M^T M``. Products of float32 numbers are exact in float64, so that
    little is lost, at the speed of a matrix product. Householder's way serves float64 factors, and
    those whose columns are nearly dependent, of which squaring would lose more.
    """
    wide = M.double()
    if M.dtype != torch.float64:
        R, info = torch.linalg.cholesky_ex(wide.mT @ wide, upper=True)
        pivots = R.diagonal()
        if info == 0 and pivots.min() > _NEARLY_DEPENDENT * pivots.max():
            return R
    return torch.linalg.qr(wide, mode="r").R


def check_factors(A: Tensor, B: Tensor) -> None:
    """Refuse what is no pair of thin factors.

    Raises:
        ConfigurationError: A is not (r, in), or B is not (out, r).
    """
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or 0 in (*A.shape, *B.shape):
        raise ConfigurationError(
            f"A has shape {tuple(A.shape)} and B has shape {tuple(B.shape)}; A (rank, in) and B (out, rank) "
            "were expected."
        )
