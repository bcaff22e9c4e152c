"""Directions of the base weights that an adapter amplifies: the paper's section 7.3, Table 7 and figure 8."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.analysis.base_weights import Weights, empty_model, open_weights
from lorakit.analysis.deltas import base_matrix, chosen, deltas_of, notices, read
from lorakit.analysis.leading import leading_svd
from lorakit.analysis.similarity import similarity_of_directions
from lorakit.analysis.spectrum import UNTRAINED, require_share
from lorakit.analysis.thin_svd import change_directions
from lorakit.errors import AdapterFileError, ConfigurationError
from lorakit.models.base_config import BaseConfig
from lorakit.models.places import find_places
from lorakit.ops.autocast import wide_dtype


@dataclass(frozen=True, kw_only=True)
class Amplification:
    """One column of Table 7. `projected_*` is ``||U^T W V||_F`` with directions U, V from three sources."""

    rank: int
    """Number r of directions, the rank of the change."""
    base_norm: float
    """``||W||_F``."""
    change_norm: float
    """``||dW||_F``, alpha / r included."""
    projected: float
    """Projection on the directions of the change."""
    projected_own: float
    """Projection on W's own r leading directions, the maximum over all directions."""
    projected_random: float
    """Projection on random directions, drawn."""
    expected_random: float
    """Root mean square of the projection on random directions (`random_projection`)."""

    @property
    def factor(self) -> float:
        """Amplification factor ``||dW||_F / ||U^T W V||_F``."""
        return self.change_norm / self.projected if self.projected else math.inf

    def to_json(self) -> dict[str, Any]:
        """Return all numbers as JSON values."""
        return {**vars(self), "factor": self.factor if math.isfinite(self.factor) else None}


def amplification(
    W: Tensor, A: Tensor, B: Tensor, scaling: float = 1.0, *, seed: int = 0
) -> Amplification:
    """Return the projection of W on the directions of ``dW = scaling * B A``, and the norm of dW.

    With ``dW = U S V^T`` (rank r), W's projection on its directions is ``||U^T W V||_F``. The amplification factor is
    ``||dW||_F`` divided by this projection. W is also projected on its own leading directions and on random ones.

    Args:
        W: Base weight, (out, in).
        A: (r, in).
        B: (out, r).
        scaling: Factor on the product.
        seed: Seed of the random directions.

    Raises:
        ConfigurationError: The shapes of W and ``B A`` differ, or the change is zero.
    """
    _require_one_shape(W, A, B)
    U, S, Vh = change_directions(A, B, scaling)
    r = len(S)
    W = W.detach().to(wide_dtype(W))
    generator = torch.Generator().manual_seed(seed)
    random_directions = [
        torch.linalg.qr(torch.randn(n, r, generator=generator, dtype=torch.float64)).Q
        for n in W.shape
    ]
    base_norm = float(torch.linalg.vector_norm(W, dtype=torch.float64))
    return Amplification(
        rank=r,
        base_norm=base_norm,
        change_norm=float(torch.linalg.vector_norm(S)),
        projected=_projected(W, U, Vh.mT),
        projected_own=float(torch.linalg.vector_norm(leading_svd(W, r)[1])),
        projected_random=_projected(W, *random_directions),
        expected_random=random_projection(r, base_norm, *W.shape),
    )


def random_projection(rank: int, base_norm: float, rows: int, columns: int) -> float:
    """Return the root mean square of ``||U^T W V||_F`` over random directions, r ||W||_F / sqrt(rows * columns)."""
    return rank * base_norm / math.sqrt(rows * columns)


def similarity_to_base(W: Tensor, A: Tensor, B: Tensor, *, base_directions: float = 0.1) -> Tensor:
    """Return ``phi(i, j)`` between the leading input directions of W (i) and those of ``B A`` (j): figure 8.

    Args:
        W: Base weight, (out, in).
        A: (r, in).
        B: (out, r).
        base_directions: Number of W's leading directions, as a share of its width.

    Returns:
        (base_directions * min(out, in), r), float64.

    Raises:
        ConfigurationError: The shapes of W and ``B A`` differ, the change is zero, or `base_directions` is out of
            range.
    """
    require_share(
        "base_directions", base_directions, "a share of the base's directions", example=0.1
    )
    _require_one_shape(W, A, B)
    Vh = change_directions(A, B)[2]
    leading = max(1, round(base_directions * min(W.shape)))
    return similarity_of_directions(leading_svd(W, leading)[2].double(), Vh)


def _require_one_shape(W: Tensor, A: Tensor, B: Tensor) -> None:
    if W.shape != (B.shape[0], A.shape[1]):
        raise ConfigurationError(
            f"W has shape {tuple(W.shape)}, and B A has shape {(B.shape[0], A.shape[1])}; equal shapes were expected."
        )


def _projected(W: Tensor, U: Tensor, V: Tensor) -> float:
    return float(torch.linalg.vector_norm(U.mT @ (W @ V.to(W.dtype)).double()))


@dataclass(frozen=True, kw_only=True)
class AdapterAmplification:
    """Table 7 for each matrix of an adapter."""

    layers: dict[str, Amplification]
    phi: dict[str, Tensor] = field(default_factory=dict)
    """`similarity_to_base` by matrix, if requested."""
    widths: dict[str, int] = field(default_factory=dict)
    """Dimension of the input space of each matrix in `phi`."""
    notices: list[str] = field(default_factory=list)

    @property
    def overall(self) -> dict[str, float] | None:
        """Medians over the matrices; None if all projections on the changes' directions are zero.

        `over_random` is the projection of W on the change's directions divided by that on random directions. `of_own`
        is the same divided by the projection on W's own leading directions. `factor` is the amplification factor.
        """
        layers = [one for one in self.layers.values() if one.projected]
        if not layers:
            return None
        return {
            "over_random": median(one.projected / one.expected_random for one in layers),
            "of_own": median(one.projected / one.projected_own for one in layers),
            "factor": median(one.factor for one in layers),
        }

    def random_level(self, name: str) -> float:
        """Return the expected phi of random directions at the last row and column."""
        return max(self.phi[name].shape) / self.widths[name]

    def to_json(self) -> dict[str, Any]:
        """Return all numbers as JSON values."""
        return {
            "overall": self.overall,
            "layers": {
                name: layer.to_json()
                | ({"phi_base": self.phi[name].tolist()} if name in self.phi else {})
                for name, layer in self.layers.items()
            },
            "notices": self.notices,
        }


def adapter_amplification(
    adapter: StoredAdapter | str | Path,
    weights: Weights,
    *,
    alpha: float | None = None,
    only: str | None = None,
    seed: int = 0,
    base_directions: float | None = None,
    progress: Callable[[str], None] | None = None,
) -> AdapterAmplification:
    """Return the amplification of each matrix of an adapter.

    Args:
        adapter: A lorakit or PEFT folder, a loralib file, or an adapter already read.
        weights: Weights of the base (`open_weights`).
        alpha: alpha of a loralib file, which does not record it.
        only: Regular expression that selects matrices by name; None selects all.
        seed: Seed of the random directions.
        base_directions: Also compare the change's directions with this share of the base's (`similarity_to_base`).
        progress: Called with the name of each matrix before it is measured.

    Raises:
        AdapterFileError: The adapter cannot be read, does not match the base, or was never trained.
        BaseModelError: The base lacks a weight.
    """
    stored = read(adapter, alpha=alpha)
    layers, untrained, phi, widths = {}, [], {}, {}
    for name, delta in chosen(deltas_of(stored), only).items():
        if progress is not None:
            progress(name)
        if delta.is_zero:
            untrained.append(f"'{name}' is skipped: it is zero in the adapter.")
            continue
        W = base_matrix(stored, delta, weights)
        layers[name] = amplification(W, delta.A, delta.B, delta.scaling, seed=seed)
        if base_directions is not None:
            phi[name] = similarity_to_base(W, delta.A, delta.B, base_directions=base_directions)
            widths[name] = W.shape[1]
    if not layers:
        raise AdapterFileError(UNTRAINED)
    sentences = [*untrained, *notices(stored), *weights.notices]
    return AdapterAmplification(layers=layers, phi=phi, widths=widths, notices=sentences)


def table7_row(adapter: StoredAdapter | str | Path, base: BaseConfig) -> dict[str, float]:
    """Return a row of Table 7 by column: the amplification of W_q in the middle block, as layer 48 of GPT-3's 96.

    In a fused projection, W_q is the rows of the queries.

    Args:
        adapter: A lorakit or PEFT folder, or an adapter already read.
        base: The base of the adapter.

    Raises:
        LorakitError: The adapter or the base cannot be read, they do not fit each other, or the adapter has no change
            of this matrix.
    """
    stored = read(adapter)
    weights = open_weights(base, stored)
    only = f"^{re.escape(_middle_query(stored, base))}$"
    (layer,) = adapter_amplification(stored, weights, only=only).layers.values()
    return {
        "from ΔW": layer.projected,
        "from W": layer.projected_own,
        "random": layer.expected_random,
        "norm of ΔW": layer.change_norm,
        "amplification": layer.factor,
    }


def _middle_query(stored: StoredAdapter, base: BaseConfig) -> str:
    """Return the adapter's name for W_q of the middle block: that of a layer, or of the rows of a fused one."""
    class_name = stored.base.class_name if stored.base else None
    queries = find_places(empty_model(base, class_name), "attention.q")
    middle = queries[(len(queries) - 1) // 2]
    return middle.path if middle.slice is None else f"{middle.path} {middle.slice}"
