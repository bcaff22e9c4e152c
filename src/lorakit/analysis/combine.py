"""Several adapters in one: their weighted sum, exactly, or TIES or DARE on their changes.

The sum of ``w1 s1 B1 A1`` and ``w2 s2 B2 A2`` is ``[w1 s1 B1, w2 s2 B2] [A1; A2]``: factors side by side,
of rank r1 + r2, with no cross terms. (Averaging A with A and B with B, as PEFT's "linear" does, has them.)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from lorakit.adapters import formats
from lorakit.adapters.formats.peft.factors import to_peft
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.adapters.formats.stored_layer import StoredLayer
from lorakit.analysis.compress import Decomposition, check_target, compress_layer, decompose, fit
from lorakit.analysis.deltas import Factors, part_rank, parts_of, read, with_parts
from lorakit.analysis.derived import KEPT, Derived, LayerResult, derive, require_known
from lorakit.analysis.thin_svd import singular_values
from lorakit.errors import AdapterFileError, ConfigurationError, WrongBaseError, require_choice
from lorakit.methods.lora import LoRA

How = Literal["sum", "ties", "dare"]


def ties(changes: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """TIES (Yadav et al. 2023): trim each change, elect a sign for each entry, average what agrees with it.

    Trimming keeps the share `density` of each change's entries, those of largest magnitude. The sign
    elected is that of the weighted sum; the mean is over the changes that are not trimmed there and
    have it, weights applied.

    Args:
        changes: Matrices of one shape.
        weights: A factor for each.
        density: Share of the entries to keep, above 0 and at most 1.

    Returns:
        One matrix of that shape.
    """
    trimmed = torch.stack([w * _largest(d, density) for d, w in zip(changes, weights, strict=True)])
    agrees = trimmed.sign() == trimmed.sum(0).sign()
    agrees &= trimmed != 0
    return (trimmed * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def dare(change: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """DARE (Yu et al. 2024): drop entries at random, and scale up the share `density` that stays."""
    stays = torch.rand(change.shape, generator=generator) < density
    return change * stays / density


def combine_adapters(
    adapters: Sequence[StoredAdapter | str | Path],
    weights: Sequence[float] | None = None,
    *,
    how: How = "sum",
    density: float = 1.0,
    seed: int = 0,
    rank: int | None = None,
    energy: float | None = None,
    allow_other_base: bool = False,
    alpha: float | None = None,
) -> Derived:
    """One adapter of several.

    Args:
        adapters: Folders of lorakit or PEFT, loralib files, or adapters that were read.
        weights: A factor for each; None is 1 for all.
        how: "sum" adds the changes, exactly. "ties" and "dare" work on the entries of the changes, as whole
            matrices, whose result is then approximated by factors: at the sum of the ranks, or at `rank`
            or `energy`.
        density: For ties and dare: the share of entries to keep.
        seed: Of the entries that dare drops.
        rank: Compress the result to this rank.
        energy: Compress the result to the rank that keeps this share of each matrix's squared norm.
        allow_other_base: Combine adapters of different bases, knowing what that means.
        alpha: The constant of loralib files, which do not record it.

    Raises:
        AdapterFileError: An adapter cannot be read, or they adapt a layer in ways that do not add up.
        ConfigurationError: A setting is out of range, or an adapter with parts that are not linear in a
            weight (DoRA, trained biases or modules) is not alone or has a weight other than 1.
        WrongBaseError: The adapters were made for different bases.
    """
    stored = [read(adapter, alpha=alpha) for adapter in adapters]
    factors = [1.0] * len(stored) if weights is None else list(weights)
    _check_settings(stored, factors, how, density)
    if rank is not None or energy is not None:
        check_target(rank, energy)
    for adapter in stored:
        require_known(adapter)
    if factors == [1.0] and (how == "sum" or density == 1):
        same = stored[0]
        kept = {key: value for key, value in same.provenance.items() if key in KEPT}
        whole = Derived(
            adapter=dataclasses.replace(same, provenance=kept, notices=[]), layers=_exact(same)
        )
        return whole if rank is None and energy is None else _compressed(whole, rank, energy)
    _check_linear(stored, factors)
    notices = _check_bases(stored, allow_other_base)
    generator = torch.Generator().manual_seed(seed)
    layers: dict[str, StoredLayer] = {}
    results: dict[str, LayerResult] = {}
    for path in dict.fromkeys(path for adapter in stored for path in adapter.layers):
        present = [
            (adapter.layers[path], factor)
            for adapter, factor in zip(stored, factors, strict=True)
            if path in adapter.layers
        ]
        if how == "sum":
            layers[path] = _sum(path, present)
            continue
        together = sum(layer.rank for layer, _ in present)
        layers[path], results[path] = _mixed(
            path,
            present,
            how,
            density,
            generator,
            rank=together if rank is None and energy is None else rank,
            energy=energy,
        )
    adapter = derive(_in_common(stored), layers)
    combined = Derived(adapter=adapter, layers=results or _exact(adapter), notices=notices)
    if how == "sum" and (rank is not None or energy is not None):
        return _compressed(combined, rank, energy)
    return combined


def _compressed(combined: Derived, rank: int | None, energy: float | None) -> Derived:
    layers, results = {}, {}
    for path, layer in combined.adapter.layers.items():
        layers[path], results[path] = compress_layer(layer, rank=rank, energy=energy)
    adapter = derive(combined.adapter, layers)
    return Derived(adapter=adapter, layers=results, notices=combined.notices)


def _exact(adapter: StoredAdapter) -> dict[str, LayerResult]:
    return {
        path: LayerResult(
            rank=layer.rank,
            norm=math.hypot(
                *(
                    float(torch.linalg.vector_norm(singular_values(A, B, layer.scaling)))
                    for A, B in parts_of(layer)
                )
            ),
            residual=0.0,
        )
        for path, layer in adapter.layers.items()
    }


# --- what can be combined ------------------------------------------------------------------------


def _check_settings(
    stored: Sequence[StoredAdapter], factors: Sequence[float], how: str, density: float
) -> None:
    if not stored:
        raise ConfigurationError("No adapter is given; name at least one.")
    if len(factors) != len(stored):
        raise ConfigurationError(
            f"There are {len(stored)} adapters and {len(factors)} weights; give one for each."
        )
    for factor in factors:
        number = isinstance(factor, (int, float)) and not isinstance(factor, bool)
        if not number or not math.isfinite(factor) or factor == 0:
            raise ConfigurationError(
                f"A weight is {factor!r}; it must be a finite number other than 0. Leave out an adapter that "
                "is to have no effect."
            )
    require_choice("how", how, get_args(How))
    if not 0 < density <= 1:
        raise ConfigurationError(
            f"density is {density!r}; it is a share of entries, above 0 and at most 1."
        )
    if how == "sum" and density != 1:
        raise ConfigurationError(
            f"density is {density:g}, and how is sum, which keeps every entry. Set how to ties or dare."
        )


def _check_linear(stored: Sequence[StoredAdapter], factors: Sequence[float]) -> None:
    """Refuse to weight or to add what has no meaning as a sum."""
    for i, adapter in enumerate(stored, start=1):
        dora = [path for path, layer in adapter.layers.items() if layer.magnitude is not None]
        found = f"DoRA magnitudes on '{dora[0]}'" if dora else ""
        if adapter.trained:
            name = next(iter(adapter.trained))
            found = f"{len(adapter.trained)} parameters trained in full, '{name}' among them"
        if found:
            raise ConfigurationError(
                f"Adapter {i} (weight {factors[i - 1]:g}) has {found}, whose effect is not linear in a weight. It "
                "can only stand alone, with weight 1."
            )
    ties_head = {isinstance(a.method, LoRA) and a.method.tie_head for a in stored}
    if len(ties_head) > 1:
        raise ConfigurationError(
            "One adapter acts on the output head through its tied embedding (tie_head), and another does not: no "
            "single adapter does both."
        )


def _check_bases(stored: Sequence[StoredAdapter], allow_other_base: bool) -> list[str]:
    known = [adapter.base for adapter in stored if adapter.base is not None]
    found = []
    if len(known) < len(stored) and len(stored) > 1:
        found.append(
            "Not every adapter records its base: that all are for the same one was not checked."
        )
    for other in known[1:]:
        try:
            found += formats.compare(known[0], other)
        except WrongBaseError as error:
            if not allow_other_base:
                raise WrongBaseError(
                    f"The adapters were made for different bases: '{known[0].source.name}' and "
                    f"'{other.source.name}' (or other weights of that name). Their sum means something on neither; "
                    "set allow_other_base if you mean it."
                ) from error
            found.append("combined over different bases because allow_other_base is set.")
    return list(dict.fromkeys(found))


def _in_common(stored: Sequence[StoredAdapter]) -> StoredAdapter:
    """The first adapter, with the base of the first that records one, and what all record alike."""
    first = stored[0]
    base = next((adapter.base for adapter in stored if adapter.base is not None), None)
    alike = {
        key: value
        for key, value in first.provenance.items()
        if all(adapter.provenance.get(key) == value for adapter in stored)
    }
    return dataclasses.replace(first, base=base, provenance=alike)


# --- one layer -----------------------------------------------------------------------------------


def _sum(path: str, present: Sequence[tuple[StoredLayer, float]]) -> StoredLayer:
    if len(present) == 1:
        layer, factor = present[0]
        return dataclasses.replace(
            layer, scaling=factor * layer.scaling, alpha=factor * layer.alpha
        )
    layers = _alike(path, [layer for layer, _ in present])
    scalings = [factor * layer.scaling for layer, (_, factor) in zip(layers, present, strict=True)]
    # Where all scale alike, the factors stay as they are, to the bit.
    common = scalings[0] if len(set(scalings)) == 1 else 1.0
    dtype = torch.promote_types(_dtype(layers), torch.float32 if common == 1.0 else _dtype(layers))
    parts: list[Factors] = []
    for pieces in zip(*(parts_of(layer) for layer in layers), strict=True):
        A = torch.cat([a.to(dtype) for a, _ in pieces])
        scaled = [b.to(dtype) * (s / common) for (_, b), s in zip(pieces, scalings, strict=True)]
        parts.append((A, torch.cat(scaled, dim=1)))
    return with_parts(layers[0], parts, scaling=common)


def _mixed(
    path: str,
    present: Sequence[tuple[StoredLayer, float]],
    how: How,
    density: float,
    generator: torch.Generator,
    *,
    rank: int | None,
    energy: float | None,
) -> tuple[StoredLayer, LayerResult]:
    layers = _alike(path, [layer for layer, _ in present])
    factors = [factor for _, factor in present]
    dtype = torch.promote_types(_dtype(layers), torch.float32)
    changes: list[Decomposition] = []
    for pieces in zip(*(parts_of(layer) for layer in layers), strict=True):
        dense = [
            layer.scaling * (B.to(dtype) @ A.to(dtype))
            for layer, (A, B) in zip(layers, pieces, strict=True)
        ]
        if how == "ties":
            mixed = ties(dense, factors, density)
        else:
            kept = (w * dare(d, density, generator) for w, d in zip(factors, dense, strict=True))
            mixed = torch.stack(list(kept)).sum(0)
        changes.append(decompose(mixed, None if rank is None else part_rank(layers[0], rank)))
    return fit(layers[0], changes, rank=rank, energy=energy)


def _alike(path: str, layers: list[StoredLayer]) -> list[StoredLayer]:
    """The layers with parts that correspond; those of different slices as factors of the whole layer."""
    if len({(layer.kind, layer.slices, layer.groups, layer.grouped) for layer in layers}) > 1:
        layers = [_whole(layer) for layer in layers]
    kinds = {(layer.kind, layer.groups, layer.grouped, layer.tied_head) for layer in layers}
    shapes = {(layer.B.shape[0], layer.A.shape[1:]) for layer in layers}
    if len(kinds) > 1 or len(shapes) > 1:
        described = " and ".join(
            f"{layer.kind} of {layer.B.shape[0]} x {tuple(layer.A.shape[1:])}" for layer in layers
        )
        raise AdapterFileError(
            f"'{path}' is not the same kind of layer in all adapters: {described}. They were made for different "
            "models, or in ways that do not add up."
        )
    return layers


def _whole(layer: StoredLayer) -> StoredLayer:
    full = to_peft(layer)
    return dataclasses.replace(
        layer,
        kind="conv" if layer.kind == "conv-loralib" else layer.kind,
        A=full.A,
        B=full.B,
        slices=(),
        initial_A=None,
        initial_B=None,
        weight_shape=None,
        grouped=layer.groups == 1,
    )


def _dtype(layers: Sequence[StoredLayer]) -> torch.dtype:
    dtype = layers[0].A.dtype
    for layer in layers[1:]:
        dtype = torch.promote_types(dtype, layer.A.dtype)
    return dtype


def _largest(change: Tensor, density: float) -> Tensor:
    """The matrix with zeros in place of all but the largest entries."""
    if density == 1:
        return change
    count = max(1, int(density * change.numel()))
    chosen = change.abs().flatten().topk(count).indices
    kept = torch.zeros_like(change).flatten()
    kept[chosen] = change.flatten()[chosen]
    return kept.view_as(change)
