"""The singular value decomposition of ``B A``, computed from the thin factors without their product.

With ``B = Q_B R_B`` and ``A^T = Q_A R_A``, the singular values of ``B A = Q_B (R_B R_A^T) Q_A^T`` are
those of the r x r matrix ``R_B R_A^T``. All computations are in float64, whatever the factors' dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.errors import ConfigurationError
from lorakit.ops.autocast import wide_dtype

_NEARLY_DEPENDENT = 1e-5
"""Smallest accepted ratio of Cholesky pivots; above it the error is below 1e-10 of the norm."""


def singular_values(A: Tensor, B: Tensor, scaling: float = 1.0) -> Tensor:
    """Return the singular values of ``scaling * B A``, descending: float64, (min(r, out, in),).

    Raises:
        ConfigurationError: A is not (r, in), or B is not (out, r).
    """
    _check_factors(A, B)
    return abs(scaling) * torch.linalg.svdvals(_triangular(B) @ _triangular(A.mT).mT)


def thin_svd(A: Tensor, B: Tensor, scaling: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``U`` (out, k), ``S`` (k,) and ``Vh`` (k, in) with ``scaling * B A = U diag(S) Vh``, in float64.

    k is min(r, out, in).

    Raises:
        ConfigurationError: A is not (r, in), or B is not (out, r).
    """
    _check_factors(A, B)
    Q_B, R_B = torch.linalg.qr(B.double())
    Q_A, R_A = torch.linalg.qr(A.double().mT)
    U, S, Vh = torch.linalg.svd(scaling * (R_B @ R_A.mT), full_matrices=False)
    return Q_B @ U, S, Vh @ Q_A.mT


def row_directions(A: Tensor) -> Tensor:
    """Return the right singular vectors of A (r, in) with nonzero singular values, as rows: (rank of A, in).

    Singular values that rounding alone can make count as zero, because their directions are arbitrary.
    """
    Q, R = torch.linalg.qr(A.double().mT)
    P, S, _ = torch.linalg.svd(R, full_matrices=False)
    return (Q @ P[:, _nonzero(S, float(S[0]), A)]).mT


def change_directions(A: Tensor, B: Tensor, scaling: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return `thin_svd` without the singular values that rounding alone can make.

    Raises:
        ConfigurationError: The shapes do not form a product, or the product is zero.
    """
    U, S, Vh = thin_svd(A, B, scaling)
    norms = torch.linalg.vector_norm(A.double()) * torch.linalg.vector_norm(B.double())
    nonzero = _nonzero(S, abs(scaling) * float(norms), A, B)
    if not nonzero.any():
        raise ConfigurationError(
            "B A is zero, so it has no directions: the adapter was never trained. Pass a trained one."
        )
    return U[:, nonzero], S[nonzero], Vh[nonzero]


def _nonzero(S: Tensor, norm: float, *factors: Tensor) -> Tensor:
    """Return which singular values exceed the errors of this decomposition and of factors computed in float32.

    The bound is the same for factors stored in 16 bits: their spacing is coarser than many trained directions, and
    the stored numbers are the ones that the model uses.

    Args:
        S: Singular values, descending, computed in float64.
        norm: Norm of the numbers in the computation, which exceeds S[0] where they cancel.
        factors: Matrices whose product has the singular values S.
    """
    in_float64 = torch.finfo(torch.float64).eps * max(n for M in factors for n in M.shape)
    in_factors = torch.finfo(wide_dtype(*factors)).eps
    return (in_float64 * norm < S) & (in_factors * S[0] < S)


def _triangular(M: Tensor) -> Tensor:
    """Return R of ``M = Q R`` for a tall M (m, r), up to the signs of its rows, in float64.

    R is the Cholesky factor of ``M^T M``: fast, and accurate because products of float32 numbers are exact in
    float64. Float64 factors and factors with nearly dependent columns use Householder QR, which does not square the
    condition number.
    """
    wide = M.double()
    if M.dtype != torch.float64:
        R, info = torch.linalg.cholesky_ex(wide.mT @ wide, upper=True)
        pivots = R.diagonal()
        if info == 0 and pivots.min() > _NEARLY_DEPENDENT * pivots.max():
            return R
    return torch.linalg.qr(wide, mode="r").R


def _check_factors(A: Tensor, B: Tensor) -> None:
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or 0 in (*A.shape, *B.shape):
        raise ConfigurationError(
            f"A has shape {tuple(A.shape)} and B has shape {tuple(B.shape)}; A (rank, in) and B (out, rank) "
            "were expected."
        )
