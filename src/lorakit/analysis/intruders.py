"""Singular vectors of an adapted weight that match none of the base's (Shuttleworth et al. 2024).

Whether a vector u matches *none* of the base's singular vectors seems to need all of them. It does not:
Lanczos' method on ``W W^T``, started from u, gives the Gauss quadrature of u's spectral measure, whose
atoms are the squared cosines between u and the singular vectors. By the Chebyshev-Markov-Stieltjes
inequalities no atom is heavier than two neighbouring weights of the quadrature, which after a few
products with W are far below the threshold for a vector that is spread over many directions.
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
from lorakit.analysis.deltas import (
    adapted_parts,
    chosen,
    deltas_of,
    notices,
    read,
    weight_name,
    weight_parts,
)
from lorakit.analysis.leading import leading_svd
from lorakit.errors import ConfigurationError

TOP, THRESHOLD = 10, 0.5
"""How many leading vectors are examined, and the cosine below which one is an intruder."""

_SMALL = 512
"""Below this width all singular vectors of the base are computed."""
_STEPS = 64
"""Products with ``W W^T`` after which a vector that is still undecided gets the full decomposition."""


@dataclass(frozen=True)
class Intruders:
    """The leading left singular vectors of an adapted weight, beside the base's."""

    singular_values: Tensor
    """Of the adapted weight, (k,), descending."""
    cosine: Tensor
    """Largest absolute cosine found between each vector and one of the base's, (k,)."""
    bound: Tensor
    """What no cosine with any of the base's vectors exceeds, (k,)."""
    threshold: float
    """An intruder's cosines are all below it."""

    @property
    def is_intruder(self) -> Tensor:
        """Whether each vector matches none of the base's, (k,)."""
        return self.cosine < self.threshold

    @property
    def count(self) -> int:
        """Number of intruders."""
        return int(self.is_intruder.sum())

    def to_json(self) -> dict[str, Any]:
        """All numbers as JSON values."""
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
    """Which of the leading left singular vectors of an adapted weight match none of the base's.

    A vector is an intruder where ``max_i |cos(u, u_i)| < threshold`` over all left singular vectors
    ``u_i`` of the base's (reduced) decomposition. Every verdict is certain; for an intruder of a large weight the
    largest cosine itself is only known to lie between `cosine` and `bound`.

    Args:
        W: The base's weight, (out, in).
        adapted: The weight with the adapter in it, (out, in).
        top: Number of leading vectors to examine; the width at most.
        threshold: Cosine below which a vector matches none.

    Raises:
        ConfigurationError: The shapes differ, or an argument is out of range.
    """
    _check(W, adapted, top, threshold)
    width = min(W.shape)
    top = min(top, width)
    U, S, _ = leading_svd(adapted, top)
    known = width if width <= _SMALL else min(2 * top, width)
    squared = (leading_svd(W, known)[0].mT.to(U.dtype) @ U).square()
    cosine = squared.amax(0).sqrt()
    if known == width:
        return Intruders(S, cosine, cosine, threshold)
    # What the known vectors leave of u's unit length is all that the others can share.
    bound = torch.maximum(cosine, (1 - squared.sum(0)).clamp(min=0).sqrt())
    undecided = (cosine < threshold) & (bound >= threshold)
    if undecided.any():
        tighter = largest_cosine_bound(W, U[:, undecided], threshold)
        bound[undecided] = torch.minimum(bound[undecided], tighter.to(bound.dtype))
        undecided &= bound >= threshold
    if undecided.any():
        everything = torch.linalg.svd(W.detach().to(U.dtype), full_matrices=False)[0]
        exact = (everything.mT @ U[:, undecided]).abs().amax(0)
        cosine[undecided] = bound[undecided] = exact
    return Intruders(S, cosine, torch.maximum(bound, cosine), threshold)


def largest_cosine_bound(W: Tensor, vectors: Tensor, enough: float) -> Tensor:
    """An upper bound on ``max_i |cos(u, u_i)|`` over the left singular vectors of W, for each u.

    Args:
        W: (out, in).
        vectors: Unit vectors u as columns, (out, n).
        enough: Stop once all bounds are below this.

    Returns:
        (n,), float64; never below the largest cosine.
    """
    W, q = W.detach().double(), vectors.double()
    if W.shape[0] > W.shape[1]:  # only the part of u in W's range can match
        Q, W = torch.linalg.qr(W)
        q = Q.mT @ q
    mass = q.square().sum(0)
    q = q / mass.sqrt().clamp(min=torch.finfo(q.dtype).tiny)
    basis, diagonal, beside = q[:, None], [], []
    bound = mass
    for step in range(1, min(_STEPS, W.shape[0]) + 1):
        z = W @ (W.mT @ q)
        diagonal.append((q * z).sum(0))
        for _ in range(2):  # once more against what rounding leaves of the earlier vectors
            z = z - torch.einsum("msn,sn->mn", basis, torch.einsum("msn,mn->sn", basis, z))
        beside.append(torch.linalg.vector_norm(z, dim=0))
        q = z / beside[-1].clamp(min=torch.finfo(z.dtype).tiny)
        basis = torch.cat([basis, q[:, None]], dim=1)
        if step % 8 == 0:
            weights = mass[:, None] * _gauss_weights(diagonal, beside[:-1])
            bound = torch.minimum(bound, (weights[:, 1:] + weights[:, :-1]).amax(1))
            if (bound < enough**2).all():
                break
    return bound.sqrt()


def _gauss_weights(diagonal: list[Tensor], beside: list[Tensor]) -> Tensor:
    """Weights of the Gauss rules of n tridiagonal matrices, their nodes ascending: (n, steps)."""
    T = torch.diag_embed(torch.stack(diagonal, dim=1))
    off = torch.stack(beside, dim=1)
    T = T + torch.diag_embed(off, offset=1) + torch.diag_embed(off, offset=-1)
    return torch.linalg.eigh(T).eigenvectors[:, 0].square()


@dataclass(frozen=True, kw_only=True)
class AdapterIntruders:
    """Intruders of an adapter's matrices."""

    layers: dict[str, Intruders]
    notices: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Number of intruders in all matrices."""
        return sum(layer.count for layer in self.layers.values())

    def to_json(self) -> dict[str, Any]:
        """All numbers as JSON values."""
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
    """Intruders of each matrix of an adapter.

    Args:
        adapter: A folder of lorakit or PEFT, a loralib file, or an adapter that was read.
        weights: The base's (`open_weights`).
        alpha: The constant of a loralib file, which does not record it.
        only: A regular expression found in the names of the matrices to look at; None looks at all.
        top: Number of leading vectors to examine.
        threshold: Cosine below which a vector matches none.
        progress: Called with the name of each matrix before it is looked at.

    Raises:
        AdapterFileError: The adapter cannot be read, or does not fit the base.
        BaseModelError: The base lacks a weight.
    """
    stored = read(adapter, alpha=alpha)
    layers = {}
    for name, delta in chosen(deltas_of(stored), only).items():
        if progress is not None:
            progress(name)
        layer = stored.layers[delta.path]
        W = weights[weight_name(delta.path, layer)]
        layers[name] = intruders(
            weight_parts(delta.path, layer, W)[delta.part],
            adapted_parts(delta.path, layer, W)[delta.part],
            top=top,
            threshold=threshold,
        )
    found = [] if not stored.trained else notices(stored)[-1:]
    return AdapterIntruders(layers=layers, notices=[*found, *weights.notices])


def _check(W: Tensor, adapted: Tensor, top: int, threshold: float) -> None:
    if W.ndim != 2 or W.shape != adapted.shape:
        raise ConfigurationError(
            f"The weights have shapes {tuple(W.shape)} and {tuple(adapted.shape)}; two matrices of one "
            "shape were expected."
        )
    if top < 1:
        raise ConfigurationError(f"top is {top}; it must be at least 1.")
    if not 0 < threshold <= 1:
        raise ConfigurationError(
            f"threshold is {threshold!r}; it is a cosine, above 0 and at most 1, for example 0.5."
        )
