"""Combination of adapters: their exact weighted sum, or TIES or DARE on their changes.

The sum of ``w1 s1 B1 A1`` and ``w2 s2 B2 A2`` is ``[w1 s1 B1, w2 s2 B2] [A1; A2]``. Concatenating the factors gives
rank r1 + r2 without cross terms. (PEFT's "linear" averages A with A and B with B, which adds cross terms.)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from lorakit.adapters import formats
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.adapters.formats.stored_layer import StoredLayer
from lorakit.analysis.compress import Decomposition, check_target, compress_layers, decompose, fit
from lorakit.analysis.deltas import (
    Factors,
    in_one_form,
    name_notices,
    parts_of,
    read_each,
    require_list,
    with_parts,
)
from lorakit.analysis.derived import (
    Derived,
    LayerResult,
    derive,
    inherited_provenance,
    require_low_rank,
)
from lorakit.analysis.spectrum import layer_norm, require_share
from lorakit.configuration import is_finite
from lorakit.errors import AdapterFileError, ConfigurationError, WrongBaseError, require_choice
from lorakit.methods.lora import LoRA
from lorakit.ops.autocast import wide_dtype

How = Literal["sum", "ties", "dare"]


def ties(changes: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """Combine changes with TIES (Yadav et al. 2023): trim, elect a sign for each entry, average the agreeing entries.

    Trimming keeps the share `density` of each change's entries, by magnitude. The elected sign is that of the weighted
    sum. The mean covers the weighted entries that are not trimmed and have the elected sign.

    Args:
        changes: Matrices of equal shape.
        weights: One factor per change.
        density: Share of the entries to keep, above 0 and at most 1.

    Returns:
        One matrix of that shape.
    """
    require_share("density", density, "a share of entries", example=0.5)
    trimmed = torch.stack([w * _trim(d, density) for d, w in zip(changes, weights, strict=True)])
    agrees = trimmed.sign() == trimmed.sum(0).sign()
    agrees &= trimmed != 0
    return (trimmed * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def dare(change: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Drop entries at random and divide the remaining share `density` by `density` (DARE, Yu et al. 2024)."""
    require_share("density", density, "a share of entries", example=0.5)
    keep = torch.rand(change.shape, generator=generator) < density
    return change * keep / density


def combine_adapters(
    adapters: Sequence[StoredAdapter | str | Path],
    weights: Sequence[float] | None = None,
    *,
    how: How = "sum",
    density: float | None = None,
    seed: int = 0,
    rank: int | None = None,
    energy: float | None = None,
    allow_other_base: bool = False,
    alpha: float | None = None,
) -> Derived:
    """Combine several adapters into one.

    Args:
        adapters: lorakit or PEFT folders, loralib files, or adapters already read.
        weights: One factor per adapter; None uses 1 for all.
        how: "sum" adds the changes exactly. "ties" and "dare" combine the entries of the dense changes, and
            approximate the result by factors. Their rank is the sum of the ranks, unless `rank` or `energy` is set.
        density: Share of entries that ties and dare keep, for example 0.2. They need it, and sum has none.
        seed: Seed of the entries that dare drops.
        rank: Compress the result to this rank.
        energy: Compress the result to the rank that keeps this share of each matrix's squared norm.
        allow_other_base: Accept adapters of different bases.
        alpha: alpha of loralib files, which do not record it.

    Raises:
        AdapterFileError: An adapter cannot be read, or the adapters' forms of a layer cannot be added.
        ConfigurationError: A setting is out of range. Or an adapter that is not linear in its weight (DoRA,
            trained biases or modules) is combined with others or has a weight other than 1.
        WrongBaseError: The adapters were trained on different bases.
    """
    require_list("adapters", adapters)
    stored = read_each(adapters, alpha)
    factors, share = check_combination(stored, weights, how, density, rank, energy)
    compressed = rank is not None or energy is not None
    if factors == [1.0] and share == 1:
        provenance = inherited_provenance(stored[0])
        if not compressed and "peft" in stored[0].provenance:  # the factors are the original's
            provenance["peft"] = stored[0].provenance["peft"]
        adapter = dataclasses.replace(stored[0], provenance=provenance, notices=[])
        if compressed:
            return compress_layers(adapter, rank, energy, [])
        return Derived(adapter=adapter, layers=_exact_results(adapter))
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
        layer_rank = rank if compressed else sum(layer.rank for layer, _ in present)
        layers[path], results[path] = _combine_entries(
            path, present, how, share, generator, rank=layer_rank, energy=energy
        )
    adapter = derive(_shared_settings(stored), layers)
    if how == "sum" and compressed:
        return compress_layers(adapter, rank, energy, notices)
    return Derived(adapter=adapter, layers=results or _exact_results(adapter), notices=notices)


def _exact_results(adapter: StoredAdapter) -> dict[str, LayerResult]:
    return {
        path: LayerResult(rank=layer.rank, norm=layer_norm(layer), residual=0.0)
        for path, layer in adapter.layers.items()
    }


# --- validation ----------------------------------------------------------------------------------


def check_combination(
    stored: Sequence[StoredAdapter],
    weights: Sequence[float] | None,
    how: How,
    density: float | None,
    rank: int | None,
    energy: float | None,
) -> tuple[list[float], float]:
    """Validate the arguments of `combine_adapters`; return a factor for each adapter, and the share of entries to keep.

    Raises:
        AdapterFileError: An adapter does not consist of low-rank factors.
        ConfigurationError: As for `combine_adapters`.
    """
    factors = [1.0] * len(stored) if weights is None else list(weights)
    if not stored:
        raise ConfigurationError("No adapter is given; name at least one.")
    if len(factors) != len(stored):
        raise ConfigurationError(
            f"There are {len(stored)} adapters and {len(factors)} weights; give one weight per adapter."
        )
    for factor in factors:
        if not is_finite(factor) or factor == 0:
            raise ConfigurationError(
                f"A weight is {factor!r}; it must be a finite number other than 0. Omit an adapter without effect."
            )
    require_choice("how", how, get_args(How))
    share = _share_of_entries(how, density)
    if rank is not None or energy is not None:
        check_target(rank, energy)
    for adapter in stored:
        require_low_rank(adapter)
    if factors != [1.0] or share != 1:
        _check_linear(stored, factors)
    return factors, share


def _share_of_entries(how: How, density: float | None) -> float:
    """Return the share of entries that `how` keeps. Without a default, TIES and DARE never keep all by oversight."""
    if how == "sum":
        if density is not None:
            raise ConfigurationError(
                f"density is {density!r}, but how is sum, which keeps every entry. Set how to ties or dare."
            )
        return 1.0
    if density is None:
        raise ConfigurationError(
            f"how is {how}, which needs density, the share of entries to keep. Set it, for example to 0.2."
        )
    require_share("density", density, "a share of entries", example=0.5)
    return density


def _check_linear(stored: Sequence[StoredAdapter], factors: Sequence[float]) -> None:
    """Reject adapters whose effect is not linear in their weight."""
    for i, adapter in enumerate(stored, start=1):
        dora = [path for path, layer in adapter.layers.items() if layer.magnitude is not None]
        nonlinear = f"DoRA magnitudes on '{dora[0]}'" if dora else ""
        if adapter.trained:
            name = next(iter(adapter.trained))
            nonlinear = f"{len(adapter.trained)} parameters trained in full, such as '{name}'"
        if nonlinear:
            raise ConfigurationError(
                f"Adapter {i} (weight {factors[i - 1]:g}) has {nonlinear}, whose effect is not linear in a weight. "
                "It can only be used alone, with weight 1."
            )
    layers = [item for adapter in stored for item in adapter.layers.items()]
    heads = {path: layer.tied_head for path, layer in layers if layer.tied_head is not None}
    for path, layer in layers:
        if path in heads.values() or layer.tied_head != heads.get(path):
            raise ConfigurationError(
                "One adapter acts on the output head through its tied embedding (tie_head), and another adapts that "
                "embedding or the head alone. Combine adapters with the same tie_head."
            )


def _check_bases(stored: Sequence[StoredAdapter], allow_other_base: bool) -> list[str]:
    recorded = [adapter.base for adapter in stored if adapter.base is not None]
    notices = []
    if len(recorded) < len(stored) and len(stored) > 1:
        notices.append("Not every adapter records its base, so the base was not checked.")
        notices += name_notices(stored)
    for other in recorded[1:]:
        try:
            notices += formats.compare(other, recorded[0])  # it would run on the first base
        except WrongBaseError as error:
            if not allow_other_base:
                raise WrongBaseError(
                    f"The adapters were trained on different bases: '{recorded[0].name}' and "
                    f"'{other.name}' (or other weights of that name). Their sum is meaningless on either base. "
                    "Set allow_other_base (--allow_other_base) to combine them anyway."
                ) from error
            notices.append("Combined adapters of different bases because allow_other_base is set.")
    return list(dict.fromkeys(notices))


def _shared_settings(stored: Sequence[StoredAdapter]) -> StoredAdapter:
    """Return the first adapter with what holds for the sum: base, provenance, and `tie_head` if one adapter has it."""
    first = stored[0]
    base = next((adapter.base for adapter in stored if adapter.base is not None), None)
    assert isinstance(first.method, LoRA)
    tie_head = any(isinstance(a.method, LoRA) and a.method.tie_head for a in stored)
    return dataclasses.replace(
        first,
        method=dataclasses.replace(first.method, tie_head=tie_head),
        base=base,
        provenance=inherited_provenance(*stored),
    )


# --- one layer -----------------------------------------------------------------------------------


def _sum(path: str, present: Sequence[tuple[StoredLayer, float]]) -> StoredLayer:
    if len(present) == 1:
        layer, factor = present[0]
        return dataclasses.replace(
            layer, scaling=factor * layer.scaling, alpha=factor * layer.alpha
        )
    layers = _aligned(path, [layer for layer, _ in present])
    scalings = [factor * layer.scaling for layer, (_, factor) in zip(layers, present, strict=True)]
    # Equal scalings leave the factors bit-identical.
    common = scalings[0] if len(set(scalings)) == 1 else 1.0
    dtype = functools.reduce(torch.promote_types, (layer.A.dtype for layer in layers))
    if common == 1.0:
        dtype = torch.promote_types(dtype, torch.float32)
    parts: list[Factors] = []
    for pieces in zip(*(parts_of(layer) for layer in layers), strict=True):
        A = torch.cat([a.to(dtype) for a, _ in pieces])
        scaled = [b.to(dtype) * (s / common) for (_, b), s in zip(pieces, scalings, strict=True)]
        parts.append((A, torch.cat(scaled, dim=1)))
    return with_parts(layers[0], parts, scaling=common)


def _combine_entries(
    path: str,
    present: Sequence[tuple[StoredLayer, float]],
    how: How,
    density: float,
    generator: torch.Generator,
    *,
    rank: int | None,
    energy: float | None,
) -> tuple[StoredLayer, LayerResult]:
    """Combine the dense changes of a layer with TIES or DARE, and factor the result."""
    layers = _aligned(path, [layer for layer, _ in present])
    factors = [factor for _, factor in present]
    dtype = wide_dtype(*(layer.A for layer in layers))
    changes: list[Decomposition] = []
    for pieces in zip(*(parts_of(layer) for layer in layers), strict=True):
        dense = [
            layer.scaling * (B.to(dtype) @ A.to(dtype))
            for layer, (A, B) in zip(layers, pieces, strict=True)
        ]
        if how == "ties":
            combined = ties(dense, factors, density)
        else:
            drops = [w * dare(d, density, generator) for w, d in zip(factors, dense, strict=True)]
            combined = torch.stack(drops).sum(0)
        changes.append(
            decompose(combined, None if rank is None else layers[0].form.part_rank(rank))
        )
    return fit(layers[0], changes, rank=rank, energy=energy)


def _aligned(path: str, layers: list[StoredLayer]) -> list[StoredLayer]:
    """Return the layers `in_one_form`, or raise an AdapterFileError if their kinds or shapes differ."""
    layers = in_one_form(layers)
    kinds = {(layer.kind, layer.groups, layer.grouped, layer.tied_head) for layer in layers}
    shapes = {(layer.B.shape[0], layer.A.shape[1:]) for layer in layers}
    if len(kinds) > 1 or len(shapes) > 1:
        described = " and ".join(
            f"{layer.kind} of {layer.B.shape[0]} x {tuple(layer.A.shape[1:])}" for layer in layers
        )
        raise AdapterFileError(
            f"'{path}' is not the same kind of layer in all adapters: {described}. Combine adapters of the same "
            "model and layer types."
        )
    return layers


def _trim(change: Tensor, density: float) -> Tensor:
    """Zero all but the share `density` of entries with the largest magnitude."""
    if density == 1:
        return change
    count = max(1, int(density * change.numel()))
    largest = change.abs().flatten().topk(count).indices
    trimmed = torch.zeros_like(change).flatten()
    trimmed[largest] = change.flatten()[largest]
    return trimmed.view_as(change)
