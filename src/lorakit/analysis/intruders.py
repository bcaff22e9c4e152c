"""Intruder dimensions: singular vectors of an adapted weight that match none of the base's (Shuttleworth et al. 2024).

Deciding that a vector u matches none of the base's singular vectors does not require computing all of them.
Lanczos' method on ``W W^T``, started from u, gives the Gauss quadrature of u's spectral measure. The atoms of this
measure are the squared cosines between u and the singular vectors. By the Chebyshev-Markov-Stieltjes inequalities,
no atom exceeds the sum of two neighbouring weights of the quadrature. If u is spread over many directions, a few
products with W bring these sums far below the threshold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.analysis.base_weights import Weights
from lorakit.analysis.deltas import base_matrix, chosen, deltas_of, other_notices, read
from lorakit.analysis.leading import leading_svd
from lorakit.analysis.spectrum import require_share
from lorakit.errors import ConfigurationError

TOP, THRESHOLD = 10, 0.5
"""Number of leading vectors to examine, and the cosine below which a vector is an intruder."""

_SMALL = 512
"""Largest width at which all singular vectors of the base are computed."""
_STEPS = 64
"""Maximum products with ``W W^T``; vectors that remain undecided need the full decomposition."""


@dataclass(frozen=True)
class Intruders:
    """The leading left singular vectors of an adapted weight, compared with the base's."""

    singular_values: Tensor
    """Singular values of the adapted weight, (k,), descending."""
    cosine: Tensor
    """Largest computed absolute cosine between each vector and the base's vectors, (k,)."""
    bound: Tensor
    """Upper bound on the cosine between each vector and all of the base's vectors, (k,)."""
    threshold: float
    """Cosine below which a vector is an intruder."""

    @property
    def is_intruder(self) -> Tensor:
        """Which vectors match none of the base's, (k,)."""
        return self.cosine < self.threshold

    @property
    def count(self) -> int:
        """Number of intruders."""
        return int(self.is_intruder.sum())

    def to_json(self) -> dict[str, Any]:
        """Return all numbers as JSON values."""
        return {
            "count": self.count,
            "singular_values": self.singular_values.tolist(),
            "cosine": self.cosine.tolist(),
            "bound": self.bound.tolist(),
            "is_intruder": self.is_intruder.tolist(),
        }


def intruders(
    W: Tensor, adapted: Tensor, *, top: int = TOP, threshold: float = THRESHOLD
) -> Intruders:
    """Return the leading left singular vectors of an adapted weight that match none of the base's.

    A vector u is an intruder if ``max_i |cos(u, u_i)| < threshold`` over all left singular vectors ``u_i`` of the
    base's (reduced) decomposition. `is_intruder` is exact. For an intruder of a large weight, the largest cosine
    is only bracketed by `cosine` and `bound`.

    Args:
        W: Base weight, (out, in).
        adapted: Weight merged with the adapter, (out, in).
        top: Number of leading vectors to examine, at most the width.
        threshold: Cosine below which a vector is an intruder.

    Raises:
        ConfigurationError: The shapes differ, or an argument is out of range.
    """
    if W.ndim != 2 or W.shape != adapted.shape:
        raise ConfigurationError(
            f"The weights have shapes {tuple(W.shape)} and {tuple(adapted.shape)}; two matrices of equal "
            "shape were expected."
        )
    if top < 1:
        raise ConfigurationError(f"top is {top}; it must be at least 1.")
    require_share("threshold", threshold, "a cosine", example=THRESHOLD)
    width = min(W.shape)
    top = min(top, width)
    U, S, _ = leading_svd(adapted, top)
    known = width if width <= _SMALL else min(2 * top, width)
    squared = (leading_svd(W, known)[0].mT.to(U.dtype) @ U).square()
    cosine = squared.amax(0).sqrt()
    if known == width:
        return Intruders(S, cosine, cosine, threshold)
    # The squared cosines sum to at most 1, so the uncomputed ones share the remainder.
    bound = torch.maximum(cosine, (1 - squared.sum(0)).clamp(min=0).sqrt())
    undecided = (cosine < threshold) & (bound >= threshold)
    if undecided.any():
        tighter = largest_cosine_bound(W, U[:, undecided], threshold)
        bound[undecided] = torch.minimum(bound[undecided], tighter.to(bound.dtype))
        undecided &= bound >= threshold
    if undecided.any():
        all_vectors = torch.linalg.svd(W.detach().to(U.dtype), full_matrices=False)[0]
        exact = (all_vectors.mT @ U[:, undecided]).abs().amax(0)
        cosine[undecided] = bound[undecided] = exact
    return Intruders(S, cosine, torch.maximum(bound, cosine), threshold)


def largest_cosine_bound(W: Tensor, vectors: Tensor, enough: float) -> Tensor:
    """Return an upper bound on ``max_i |cos(u, u_i)|`` over the left singular vectors of W, for each u.

    Args:
        W: (out, in).
        vectors: Unit vectors u as columns, (out, n).
        enough: Stop once all bounds are below this.

    Returns:
        (n,), float64; never below the largest cosine.
    """
    W, q = W.detach().double(), vectors.double()
    if W.shape[0] > W.shape[1]:  # only u's projection on W's range can match
        Q, W = torch.linalg.qr(W)
        q = Q.mT @ q
    mass = q.square().sum(0)
    q = q / mass.sqrt().clamp(min=torch.finfo(q.dtype).tiny)
    basis, diagonal, off_diagonal = q[:, None], [], []
    bound = mass
    for step in range(1, min(_STEPS, W.shape[0]) + 1):
        z = W @ (W.mT @ q)
        diagonal.append((q * z).sum(0))
        for _ in range(2):  # orthogonalise twice, against rounding errors
            z = z - torch.einsum("msn,sn->mn", basis, torch.einsum("msn,mn->sn", basis, z))
        off_diagonal.append(torch.linalg.vector_norm(z, dim=0))
        q = z / off_diagonal[-1].clamp(min=torch.finfo(z.dtype).tiny)
        basis = torch.cat([basis, q[:, None]], dim=1)
        if step % 8 == 0:
            weights = mass[:, None] * _gauss_weights(diagonal, off_diagonal[:-1])
            bound = torch.minimum(bound, (weights[:, 1:] + weights[:, :-1]).amax(1))
            if (bound < enough**2).all():
                break
    return bound.sqrt()


def _gauss_weights(diagonal: list[Tensor], off_diagonal: list[Tensor]) -> Tensor:
    """Return the Gauss quadrature weights of n tridiagonal matrices, in ascending order of nodes: (n, steps)."""
    T = torch.diag_embed(torch.stack(diagonal, dim=1))
    off = torch.stack(off_diagonal, dim=1)
    T = T + torch.diag_embed(off, offset=1) + torch.diag_embed(off, offset=-1)
    return torch.linalg.eigh(T).eigenvectors[:, 0].square()


@dataclass(frozen=True, kw_only=True)
class AdapterIntruders:
    """Intruders of an adapter's matrices."""

    layers: dict[str, Intruders]
    notices: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Number of intruders over all matrices."""
        return sum(layer.count for layer in self.layers.values())

    def to_json(self) -> dict[str, Any]:
        """Return all numbers as JSON values."""
        return {
            "overall": {
                "count": self.count,
                "examined": sum(len(layer.cosine) for layer in self.layers.values()),
            },
            "layers": {name: layer.to_json() for name, layer in self.layers.items()},
            "notices": self.notices,
        }


def adapter_intruders(
    adapter: StoredAdapter | str | Path,
    weights: Weights,
    *,
    alpha: float | None = None,
    only: str | None = None,
    top: int = TOP,
    threshold: float = THRESHOLD,
    progress: Callable[[str], None] | None = None,
) -> AdapterIntruders:
    """Return the intruders of each matrix of an adapter.

    Args:
        adapter: A lorakit or PEFT folder, a loralib file, or an adapter already read.
        weights: Weights of the base (`open_weights`).
        alpha: alpha of a loralib file, which does not record it.
        only: Regular expression that selects matrices by name; None selects all.
        top: Number of leading vectors to examine.
        threshold: Cosine below which a vector is an intruder.
        progress: Called with the name of each matrix before it is measured.

    Raises:
        AdapterFileError: The adapter cannot be read, or does not match the base.
        BaseModelError: The base lacks a weight.
    """
    stored = read(adapter, alpha=alpha)
    layers = {}
    for name, delta in chosen(deltas_of(stored), only).items():
        if progress is not None:
            progress(name)
        W = base_matrix(stored, delta, weights)
        layers[name] = intruders(W, delta.added_to(W), top=top, threshold=threshold)
    # Intruders include DoRA's magnitudes, so `factor_notices` do not apply.
    return AdapterIntruders(layers=layers, notices=[*other_notices(stored), *weights.notices])
