"""An adapter's layers as matrices ``scaling * B A``, each beside the matrix of the base it is added to.

A layer has one such pair of factors for each adapted slice of a fused projection, and one for each group
of a convolution. PiSSA's frozen start is appended with a minus sign. A convolution's kernel is seen as
the matrix (out, in * taps); loralib's factors of one as the matrix in which they are a product,
(out * K, in * K).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lorakit.adapters import formats
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.adapters.formats.stored_layer import StoredLayer
from lorakit.analysis.checkpoints import is_checkpoint, read_checkpoint
from lorakit.errors import AdapterFileError, ConfigurationError

Factors = tuple[Tensor, Tensor]
"""A (rank, in) and B (out, rank) of one matrix."""


@dataclass(frozen=True, kw_only=True)
class Delta:
    """One matrix of an adapter: ``scaling * B A``."""

    name: str
    """The layer's path, with its rows or group where there are several."""
    path: str
    """Path of the layer in the base model."""
    part: int
    """Which of the layer's matrices it is."""
    A: Tensor
    """(rank, in)."""
    B: Tensor
    """(out, rank)."""
    scaling: float


def read(adapter: StoredAdapter | str | Path, *, alpha: float | None = None) -> StoredAdapter:
    """The adapter or a run's checkpoint at a path; one that was read already, as it is.

    Args:
        adapter: A folder of lorakit or PEFT, a loralib file, a checkpoint, or an adapter.
        alpha: The constant of a loralib file, which does not record it.

    Raises:
        AdapterFileError: Nothing readable is there.
    """
    if isinstance(adapter, StoredAdapter):
        return adapter
    checkpoint = is_checkpoint(adapter)
    stored = read_checkpoint(adapter) if checkpoint else formats.read(adapter, alpha=alpha)
    # In the order of the blocks: a JSON file has block 10 before block 2.
    stored.layers = dict(sorted(stored.layers.items(), key=lambda item: _in_order(item[0])))
    return stored


def deltas_of(stored: StoredAdapter) -> dict[str, Delta]:
    """The matrices of an adapter, by name.

    Raises:
        AdapterFileError: It has no low-rank factors.
    """
    if not stored.layers:
        raise AdapterFileError(
            f"This adapter ({type(stored.method).__name__}) has no low-rank factors to look at. "
            "lorakit extract makes some from a fully fine-tuned model."
        )
    return {delta.name: delta for delta in _deltas(stored)}


def chosen(deltas: Mapping[str, Delta], only: str | None) -> dict[str, Delta]:
    """The matrices in whose names the regular expression `only` is found; all of them for None.

    Raises:
        ConfigurationError: It is no regular expression, or is found in none.
    """
    if only is None:
        return dict(deltas)
    try:
        pattern = re.compile(only)
    except re.error as error:
        raise ConfigurationError(f"only is {only!r}, no regular expression: {error}.") from None
    found = {name: delta for name, delta in deltas.items() if pattern.search(name)}
    if not found:
        raise ConfigurationError(
            f"only is {only!r}, which is found in none of the {len(deltas)} names; the first is "
            f"'{next(iter(deltas))}'."
        )
    return found


def family(name: str) -> str:
    """The name with a star for its block's number: what the like matrices of all blocks share."""
    return re.sub(r"\.\d+(?=\.|$| )", ".*", name)


def in_common(one: Mapping[str, Delta], other: Mapping[str, Delta]) -> tuple[list[str], list[str]]:
    """Names of the matrices that two adapters have in common, and a notice on those that one has alone.

    Raises:
        AdapterFileError: There are none, or a common one has two shapes.
    """
    shared = [name for name in one if name in other]
    if not shared:
        raise AdapterFileError(
            f"The two adapters have no matrix in common: the first adapts '{next(iter(one))}' and others, the "
            f"second '{next(iter(other))}' and others. Compare adapters of the same layers."
        )
    for name in shared:
        shapes = [(d.B.shape[0], d.A.shape[1]) for d in (one[name], other[name])]
        if shapes[0] != shapes[1]:
            raise AdapterFileError(
                f"'{name}' is {shapes[0][0]} x {shapes[0][1]} in the first adapter and {shapes[1][0]} x "
                f"{shapes[1][1]} in the second: they are for different base models."
            )
    found = []
    for which, mine, theirs in (("first", one, other), ("second", other, one)):
        alone = [name for name in mine if name not in theirs]
        if alone:
            found.append(
                f"{len(alone)} matrices are in the {which} adapter alone, '{alone[0]}' among them."
            )
    return shared, found


def notices(stored: StoredAdapter) -> list[str]:
    """What ``scaling * B A`` does not say of an adapter, in sentences."""
    found = []
    dora = sum(layer.magnitude is not None for layer in stored.layers.values())
    if dora:
        found.append(
            f"{dora} layers have DoRA magnitudes, which also scale the rows of the base: B A is their "
            "change of direction alone."
        )
    if stored.trained:
        found.append(
            f"{len(stored.trained)} parameters are trained in full, beside the low-rank factors: "
            f"{_some(list(stored.trained))}."
        )
    return found


def parts_of(layer: StoredLayer) -> list[Factors]:
    """The layer's factors, a pair for each slice or group (see the module's text)."""
    A, B = layer.A, layer.B
    parts = _split(layer, A, B)
    if layer.initial_A is not None and layer.initial_B is not None:
        start = _split(layer, layer.initial_A, layer.initial_B)
        parts = [
            (torch.cat([a, a0]), torch.cat([b, -b0], dim=1))
            for (a, b), (a0, b0) in zip(parts, start, strict=True)
        ]
    return parts


def with_parts(layer: StoredLayer, parts: Sequence[Factors], scaling: float = 1.0) -> StoredLayer:
    """The layer with other factors of the same widths, and any rank common to all parts.

    The parts are the whole change, so that PiSSA's start, which `parts_of` puts into them, goes.
    """
    A, B = torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts])
    if layer.kind == "conv":
        A = A.unflatten(1, tuple(layer.A.shape[1:]))
        B = B.view(*B.shape, *(1 for _ in layer.B.shape[2:]))
    rank = A.shape[0] // (max(1, len(layer.slices)) * rank_unit(layer))
    return replace(
        layer,
        A=A.contiguous(),
        B=B.contiguous(),
        scaling=scaling,
        alpha=scaling * rank,
        initial_A=None,
        initial_B=None,
    )


def rank_unit(layer: StoredLayer) -> int:
    """Rank of a part for each rank of the layer; above 1 only for loralib's convolutions."""
    return layer.kernel_width if layer.kind == "conv-loralib" else 1


def part_rank(layer: StoredLayer, rank: int) -> int:
    """Rank of each part of a layer of this rank, at least 1: a convolution's groups share it out."""
    return -(-rank // layer.groups) * rank_unit(layer)


def weight_name(path: str, layer: StoredLayer) -> str:
    """Name of the base parameter that the layer's factors change."""
    return f"{path}.{'in_proj_weight' if layer.kind == 'attention' else 'weight'}"


def weight_parts(path: str, layer: StoredLayer, W: Tensor) -> list[Tensor]:
    """The matrices of a base weight to which the layer's parts are added, each (out, in) (views).

    Raises:
        AdapterFileError: The weight has another shape than the adapter was made for.
    """
    if not layer.grouped:
        raise AdapterFileError(
            f"The factors of '{path}' mix all input channels of a grouped convolution, which no weight of the "
            "base can hold. There is nothing to compare them with."
        )
    matrix = W
    if layer.kind == "embedding" or (layer.kind == "linear" and layer.transposed):
        matrix = W.mT
    elif layer.kind == "conv":
        matrix = W.flatten(1)
    elif layer.kind == "conv-loralib" and W.numel() == layer.B.shape[0] * layer.A.shape[1]:
        matrix = W.reshape(layer.B.shape[0], layer.A.shape[1])
    columns = layer.A.flatten(1).shape[1]
    rows = layer.slices[0].groups * layer.slices[0].stride if layer.slices else layer.B.shape[0]
    if layer.kind == "linear" and matrix.shape != (rows, columns) == tuple(matrix.mT.shape):
        matrix = matrix.mT  # a file of loralib's does not say how the base stores its weight
    if matrix.shape != (rows, columns):
        raise AdapterFileError(
            f"The base's weight of '{path}' has shape {tuple(W.shape)}, and the adapter changes a matrix of "
            f"{rows} x {columns} numbers. Name the base that the adapter was made for."
        )
    if layer.slices:
        return [matrix[piece.rows()] for piece in layer.slices]
    return list(matrix.chunk(layer.groups))


def adapted_parts(path: str, layer: StoredLayer, W: Tensor) -> list[Tensor]:
    """The matrices of `weight_parts` with the adapter in them, DoRA's magnitudes included, each (out, in).

    Raises:
        AdapterFileError: The weight has another shape than the adapter was made for.
    """
    adapted = []
    row = 0
    for matrix, (A, B) in zip(weight_parts(path, layer, W), parts_of(layer), strict=True):
        dtype = torch.promote_types(torch.promote_types(A.dtype, W.dtype), torch.float32)
        merged = matrix.to(dtype) + layer.scaling * (B.to(dtype) @ A.to(dtype))
        if layer.magnitude is not None:
            magnitude = layer.magnitude[row : row + len(merged)].to(dtype)
            merged *= (magnitude / torch.linalg.vector_norm(merged, dim=1))[:, None]
        row += len(merged)
        adapted.append(merged)
    return adapted


def _split(layer: StoredLayer, A: Tensor, B: Tensor) -> list[Factors]:
    if layer.slices:
        blocks = B.split([piece.total for piece in layer.slices])
        return list(zip(A.chunk(len(layer.slices)), blocks, strict=True))
    if layer.kind == "conv":
        pairs = zip(A.flatten(1).chunk(layer.groups), B.flatten(1).chunk(layer.groups), strict=True)
        return list(pairs)
    return [(A, B)]


def _deltas(stored: StoredAdapter) -> Iterator[Delta]:
    for path, layer in stored.layers.items():
        parts = parts_of(layer)
        labels = [f" {piece}" for piece in layer.slices] or [""]
        if layer.groups > 1:
            labels = [f" group {i}" for i in range(layer.groups)]
        for i, ((A, B), label) in enumerate(zip(parts, labels, strict=True)):
            yield Delta(name=path + label, path=path, part=i, A=A, B=B, scaling=layer.scaling)


def _in_order(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
