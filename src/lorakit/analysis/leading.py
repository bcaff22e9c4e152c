"""The leading singular vectors of a whole weight matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorakit.errors import ConfigurationError

_SMALL = 512
"""Below this width a full decomposition takes milliseconds."""
_TOLERANCE = 1e-5
"""Relative error of singular values at which the iteration stops."""


def leading_svd(W: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """``U`` (out, k), ``S`` (k,) and ``Vh`` (k, in) of the k largest singular values, descending.

    Implicitly restarted Lanczos (ARPACK) where k is a small part of the width, else the full
    decomposition. On the CPU, in W's precision but at least float32.

    Args:
        W: (out, in).
        k: How many; all, where there are fewer.

    Raises:
        ConfigurationError: scipy is not installed.
    """
    W = W.detach().cpu()
    W = W if W.dtype == torch.float64 else W.float()
    width = min(W.shape)
    k = min(k, width)
    if width <= _SMALL or k > width // 16:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        return U[:, :k], S[:k], Vh[:k]
    if not W.any():  # any vectors are singular ones, but Lanczos finds no direction to start in
        out, width_in = W.shape
        return (
            torch.eye(out, k, dtype=W.dtype),
            W.new_zeros(k),
            torch.eye(k, width_in, dtype=W.dtype),
        )
    try:
        from scipy.sparse.linalg import svds
    except ImportError:
        raise ConfigurationError(
            "Singular vectors of a large weight need scipy: pip install 'lorakit[analysis]'"
        ) from None
    # A fixed start, so that the same weights give the same bits.
    start = np.random.default_rng(0).standard_normal(width).astype(W.numpy().dtype)
    found: Any = svds(W.numpy(), k=k, v0=start, tol=_TOLERANCE)  # type: ignore[arg-type]
    # Copies: scipy gives views read backwards, which torch does not take, and which for k = 1 count as contiguous.
    U, S, Vh = (torch.from_numpy(part.copy()) for part in found)
    order = S.argsort(descending=True)
    return U[:, order], S[order], Vh[order]
