"""Distance and angle between the changes of two adapters or checkpoints."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.analysis.deltas import (
    Delta,
    deltas_of,
    factor_notices,
    in_common,
    pair_in_one_form,
    read_each,
)
from lorakit.analysis.spectrum import spectrum
from lorakit.errors import AdapterFileError, ConfigurationError

Change = tuple[Tensor, Tensor, float]
"""A (r, in), B (out, r) and the scaling of ``scaling * B A``."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Norms and distance of two changes D1 and D2 of one matrix or of several. Norms are Frobenius norms."""

    first: float
    """``||D1||``."""
    second: float
    """``||D2||``."""
    distance: float
    """``||D1 - D2||``."""

    @property
    def relative(self) -> float:
        """The distance divided by the first norm."""
        return self.distance / self.first if self.first else (math.inf if self.distance else 0.0)

    @property
    def angle(self) -> float | None:
        """Angle in degrees between the two changes as vectors; None if one is zero.

        ``sin^2(angle / 2) = (distance^2 - (first - second)^2) / (4 first second)``, which is accurate for small
        angles.
        """
        if not self.first or not self.second:
            return None
        squared = (self.distance**2 - (self.first - self.second) ** 2) / (
            4 * self.first * self.second
        )
        return math.degrees(2 * math.asin(math.sqrt(min(max(squared, 0.0), 1.0))))

    def to_json(self) -> dict[str, Any]:
        """Return all numbers as JSON values."""
        relative = self.relative if math.isfinite(self.relative) else None
        return {**vars(self), "relative": relative, "angle": self.angle}


def difference(first: Change, second: Change) -> Difference:
    """Return the norms and the distance of ``s1 * B1 A1`` and ``s2 * B2 A2``, computed from the factors.

    Args:
        first: A (r1, in), B (out, r1) and the scaling.
        second: A (r2, in), B (out, r2) and the scaling.

    Raises:
        ConfigurationError: The shapes differ.
    """
    norms = [spectrum(*change).norm for change in (first, second)]
    (A1, B1, s1), (A2, B2, s2) = ((A.double(), B.double(), s) for A, B, s in (first, second))
    if A1.shape[1] != A2.shape[1] or B1.shape[0] != B2.shape[0]:
        raise ConfigurationError(
            f"The first change is {B1.shape[0]} x {A1.shape[1]} and the second {B2.shape[0]} x {A2.shape[1]}; "
            "equal shapes were expected."
        )
    distance = 0.0
    if s1 != s2 or not A1.equal(A2) or not B1.equal(B2):
        distance = spectrum(torch.cat([A1, A2]), torch.cat([s1 * B1, -s2 * B2], dim=1)).norm
    return Difference(first=norms[0], second=norms[1], distance=distance)


def together(differences: Collection[Difference]) -> Difference:
    """Return the difference of all matrices together."""
    total = {
        name: math.sqrt(sum(getattr(one, name) ** 2 for one in differences))
        for name in ("first", "second", "distance")
    }
    return Difference(**total)


@dataclass(frozen=True, kw_only=True)
class AdapterDiff:
    """The differences between two adapters."""

    layers: dict[str, Difference]
    """Differences of the low-rank changes by matrix; a matrix that an adapter lacks counts as zero."""
    trained: dict[str, Difference]
    """Differences of tensors trained in full: biases, heads, DoRA's magnitudes, biases of B, other methods' modules."""
    notices: list[str] = field(default_factory=list)

    @property
    def overall(self) -> Difference:
        """All low-rank changes together."""
        return together(self.layers.values())

    @property
    def changes_and_trained(self) -> dict[str, Difference]:
        """All differences by name; those of tensors trained in full have the suffix (whole)."""
        return {**self.layers, **{f"{name} (whole)": one for name, one in self.trained.items()}}

    def most_moved(self) -> list[str]:
        """Return the names of the matrices in descending order of their distance."""
        return sorted(self.layers, key=lambda name: -self.layers[name].distance)

    def to_json(self) -> dict[str, Any]:
        """Return all numbers as JSON values."""
        return {
            "overall": self.overall.to_json() if self.layers else None,
            "layers": {name: one.to_json() for name, one in self.layers.items()},
            "trained": {name: one.to_json() for name, one in self.trained.items()},
            "most_moved": self.most_moved(),
            "notices": self.notices,
        }


def adapter_diff(
    first: StoredAdapter | str | Path,
    second: StoredAdapter | str | Path,
    *,
    alpha: float | None = None,
) -> AdapterDiff:
    """Return the differences between two adapters or checkpoints.

    Args:
        first: A lorakit or PEFT folder, a loralib file, a checkpoint (``RUN/checkpoints/step-000100``), or an
            adapter already read.
        second: The second adapter, in any of these forms.
        alpha: alpha of loralib files, which do not record it.

    Raises:
        AdapterFileError: One cannot be read, or they have nothing in common.
    """
    stored, sentences = pair_in_one_form(*read_each([first, second], alpha))
    layers = {}
    if any(adapter.layers for adapter in stored):
        one, other = (deltas_of(adapter) for adapter in stored)
        sentences += in_common(one, other)[1]
        sentences += dict.fromkeys(chain.from_iterable(map(factor_notices, stored)))
        for name in dict.fromkeys((*one, *other)):
            present = one.get(name) or other[name]
            changes = [_change(side.get(name), present) for side in (one, other)]
            layers[name] = difference(changes[0], changes[1])
    tensors = [_trained_tensors(adapter) for adapter in stored]
    shared = [name for name in tensors[0] if name in tensors[1]]
    for which, mine, theirs in (("first", *tensors), ("second", *reversed(tensors))):
        only_mine = [name for name in mine if name not in theirs]
        if only_mine:
            sentences.append(f"'{only_mine[0]}' is trained in full only in the {which} adapter.")
    if not layers and not shared:
        methods = " and ".join(type(adapter.method).__name__ for adapter in stored)
        raise AdapterFileError(
            f"The two adapters ({methods}) have nothing in common. {' '.join(sentences)} Compare adapters of the same "
            "method and layers."
        )
    trained = {
        name: _tensor_difference(name, tensors[0][name], tensors[1][name]) for name in shared
    }
    return AdapterDiff(layers=layers, trained=trained, notices=sentences)


def _change(delta: Delta | None, present: Delta) -> Change:
    if delta is None:
        return present.A, torch.zeros_like(present.B), 0.0
    return delta.A, delta.B, delta.scaling


def _trained_tensors(stored: StoredAdapter) -> dict[str, Tensor]:
    vectors = {
        f"{path}.{name}": layer.tensors[name]
        for path, layer in stored.layers.items()
        for name in ("magnitude", "B_bias")
        if name in layer.tensors
    }
    return {**stored.trained, **stored.module_tensors, **vectors}


def _tensor_difference(name: str, one: Tensor, other: Tensor) -> Difference:
    if one.shape != other.shape:
        raise AdapterFileError(
            f"'{name}' has shape {tuple(one.shape)} in the first adapter and {tuple(other.shape)} in the second: "
            "they were trained for different tasks or bases. Compare adapters of one task and base."
        )
    norms = [
        float(torch.linalg.vector_norm(t, dtype=torch.float64))
        for t in (one, other, one.double() - other.double())
    ]
    return Difference(first=norms[0], second=norms[1], distance=norms[2])
