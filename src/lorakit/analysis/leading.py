"""Leading singular vectors of a dense weight matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorakit.errors import ConfigurationError
from lorakit.ops.autocast import wide_dtype

_SMALL = 512
"""Largest width that always gets a full decomposition, which takes milliseconds."""
_TOLERANCE = 1e-5
"""Relative error of singular values at which the iteration stops."""


def leading_svd(W: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``U`` (out, k), ``S`` (k,) and ``Vh`` (k, in) of the k largest singular values, descending.

    Uses implicitly restarted Lanczos (ARPACK) if k is a small part of the width, else the full decomposition. Both
    run on the CPU, in W's precision but at least float32.

    Args:
        W: (out, in).
        k: Number of singular values; at most min(out, in) are returned.

    Raises:
        ConfigurationError: scipy is not installed.
    """
    W = W.detach().cpu().to(wide_dtype(W))
    width = min(W.shape)
    k = min(k, width)
    if width <= _SMALL or k > width // 16:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        return U[:, :k], S[:k], Vh[:k]
    if not W.any():  # Lanczos cannot start on a zero matrix, whose singular vectors are arbitrary
        rows, columns = W.shape
        U, Vh = torch.eye(rows, k, dtype=W.dtype), torch.eye(k, columns, dtype=W.dtype)
        return U, W.new_zeros(k), Vh
    try:
        from scipy.sparse.linalg import svds
    except ImportError:
        raise ConfigurationError(
            'Singular vectors of a large weight need scipy: pip install "lorakit[analysis]"'
        ) from None
    # The fixed start vector makes the result deterministic.
    start = np.random.default_rng(0).standard_normal(width).astype(W.numpy().dtype)
    usv: Any = svds(W.numpy(), k=k, v0=start, tol=_TOLERANCE)  # type: ignore[arg-type]
    # scipy returns views with negative strides, which torch rejects; for k = 1 numpy calls them contiguous.
    U, S, Vh = (torch.from_numpy(part.copy()) for part in usv)
    order = S.argsort(descending=True)
    return U[:, order], S[order], Vh[order]
