"""An adapter's layers as matrices ``scaling * B A``, and the base matrices to which they are added.

A layer has one pair of factors per adapted slice of a fused projection, or per group of a convolution.
PiSSA's frozen initial factors are appended with a minus sign. A convolution's kernel is reshaped to the matrix
(out, in * taps).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import TypeVar

import torch
from torch import Tensor

from lorakit.adapters import formats
from lorakit.adapters.formats.peft.factors import to_peft
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.adapters.formats.stored_layer import StoredLayer
from lorakit.errors import AdapterFileError, ConfigurationError, WrongBaseError
from lorakit.formatting import listed
from lorakit.methods.lora.layer import dora_factor
from lorakit.models.tree import natural
from lorakit.ops.autocast import wide_dtype
from lorakit.training.checkpoint_adapter import is_checkpoint, read_checkpoint

Layer = TypeVar("Layer")
Factors = tuple[Tensor, Tensor]
"""A (rank, in) and B (out, rank) of one matrix."""


@dataclass(frozen=True, kw_only=True)
class Delta:
    """One matrix of an adapter: ``scaling * B A``."""

    path: str
    """Path of the layer in the base model."""
    part: int
    """Index among the layer's matrices."""
    A: Tensor
    """(rank, in)."""
    B: Tensor
    """(out, rank)."""
    scaling: float
    magnitude: Tensor | None = None
    """DoRA's norms of the rows of the adapted weight, (out,)."""

    @property
    def is_zero(self) -> bool:
        """Whether A or B is zero, as B is before training, or PiSSA's factors equal their start."""
        if not self.A.any() or not self.B.any():
            return True
        r = len(self.A) // 2
        return self.A[:r].equal(self.A[r:]) and self.B[:, :r].equal(-self.B[:, r:])

    def added_to(self, W: Tensor) -> Tensor:
        """Return the base matrix W (out, in) merged with the change, DoRA's magnitudes included."""
        dtype = wide_dtype(self.A, W)
        merged = W.to(dtype) + self.scaling * (self.B.to(dtype) @ self.A.to(dtype))
        if self.magnitude is not None:
            norms = torch.linalg.vector_norm(merged, dim=1)
            merged *= dora_factor(self.magnitude.to(dtype), norms)[:, None]
        return merged


def read(adapter: StoredAdapter | str | Path, *, alpha: float | None = None) -> StoredAdapter:
    """Read an adapter or a run's checkpoint; return a `StoredAdapter` unchanged.

    Args:
        adapter: A lorakit or PEFT folder, a loralib file, a checkpoint, or an adapter already read.
        alpha: alpha of a loralib file, which does not record it.

    Raises:
        AdapterFileError: The adapter cannot be read.
    """
    if isinstance(adapter, StoredAdapter):
        return adapter
    if not isinstance(adapter, str | os.PathLike):
        raise AdapterFileError(
            f"The adapter is {adapter!r:.80}; a folder, a loralib file or a StoredAdapter was expected. For an adapter "
            "of a model in memory, pass adapters.stored(name)."
        )
    checkpoint = is_checkpoint(adapter)
    stored = read_checkpoint(adapter) if checkpoint else formats.read(adapter, alpha=alpha)
    # Sort by block number: a JSON file lists block 10 before block 2.
    stored.layers = dict(sorted(stored.layers.items(), key=lambda item: natural(item[0])))
    return stored


def alphas(
    adapters: Sequence[StoredAdapter | str | Path], alpha: float | None
) -> list[float | None]:
    """Return the alpha with which to read each of several adapters: `alpha` for the loralib files, None for folders.

    Without a loralib file it is `alpha` for all of them, so that reading rejects one that contradicts a folder.
    """
    files = [isinstance(x, str | os.PathLike) and os.path.isfile(x) for x in adapters]
    return [alpha if is_file or not any(files) else None for is_file in files]


def read_each(
    adapters: Sequence[StoredAdapter | str | Path], alpha: float | None
) -> list[StoredAdapter]:
    """Read several adapters, or raise an AdapterFileError; `alpha` is that of the loralib files among them."""
    each = zip(adapters, alphas(adapters, alpha), strict=True)
    return [read(adapter, alpha=its_alpha) for adapter, its_alpha in each]


def require_list(name: str, paths: object) -> None:
    """Raise a ConfigurationError for one path where a list is expected: a text is a sequence of its characters."""
    if isinstance(paths, str | Path):
        raise ConfigurationError(
            f"{name} is {str(paths)!r}; a list of paths was expected: write [{str(paths)!r}]."
        )


def deltas_of(stored: StoredAdapter) -> dict[str, Delta]:
    """Return the matrices of an adapter by name: the layer's path, with the rows or group if there are several.

    Raises:
        AdapterFileError: It has no low-rank factors.
    """
    if not stored.layers:
        raise AdapterFileError(
            f"This adapter ({type(stored.method).__name__}) has no low-rank factors to analyze. "
            "lorakit extract computes factors from a fully fine-tuned model."
        )
    deltas = {}
    for path, layer in stored.layers.items():
        labels = [f" {piece}" for piece in layer.slices] or [""]
        if layer.groups > 1:
            piece = "expert" if layer.is_stacked else "group"
            labels = [f" {piece} {i}" for i in range(layer.groups)]
        row = 0
        for i, ((A, B), label) in enumerate(zip(parts_of(layer), labels, strict=True)):
            magnitude = None if layer.magnitude is None else layer.magnitude[row : row + len(B)]
            row += len(B)
            deltas[path + label] = Delta(
                path=path, part=i, A=A, B=B, scaling=layer.scaling, magnitude=magnitude
            )
    return deltas


def chosen(deltas: Mapping[str, Delta], only: str | None) -> dict[str, Delta]:
    """Return the matrices whose names match the regular expression `only`; all of them for None.

    Raises:
        ConfigurationError: `only` is not a regular expression, or matches no name.
    """
    if only is None:
        return dict(deltas)
    try:
        pattern = re.compile(only)
    except re.error as error:
        raise ConfigurationError(f"only is {only!r}, not a regular expression: {error}.") from None
    matching = {name: delta for name, delta in deltas.items() if pattern.search(name)}
    if not matching:
        raise ConfigurationError(
            f"only is {only!r}, which matches none of the {len(deltas)} names, such as '{next(iter(deltas))}'."
        )
    return matching


def family(name: str) -> str:
    """Return the name with a star in place of its block's number."""
    return re.sub(r"\.\d+(?=\.|$| )", ".*", name)


def families(layers: Mapping[str, Layer]) -> dict[str, dict[str, Layer]]:
    """Group matrices, by name, into families whose names differ only in the block's number."""
    grouped: dict[str, dict[str, Layer]] = {}
    for name, layer in layers.items():
        grouped.setdefault(family(name), {})[name] = layer
    return grouped


def in_one_form(layers: Sequence[StoredLayer]) -> list[StoredLayer]:
    """Return layers with corresponding parts: layers with different slices or groups become PEFT's one pair.

    Raises:
        AdapterFileError: PEFT's form cannot represent one of them.
    """
    if len({(layer.kind, layer.slices, layer.groups, layer.grouped) for layer in layers}) == 1:
        return list(layers)
    return [replace(to_peft(layer), grouped=layer.groups == 1) for layer in layers]


def name_notices(stored: Sequence[StoredAdapter]) -> list[str]:
    """Return a sentence if adapters name different bases; a local copy has the name of the hub id's last part."""
    names: dict[str, str] = {}
    for name in filter(None, (adapter.base_name for adapter in stored)):
        names.setdefault(PurePath(name).name.lower(), f"'{name}'")
    if len(names) < 2:
        return []
    return [f"The adapters name different bases: {listed([*names.values()])}."]


def base_notices(one: StoredAdapter, other: StoredAdapter) -> list[str]:
    """Return a sentence if two adapters are known to have been trained on different bases.

    Without two records of the same weights, the names of the bases are compared.
    """
    bases = [adapter.base for adapter in (one, other) if adapter.base is not None]
    if len(bases) < 2 or bases[0].excluded != bases[1].excluded:
        return name_notices([one, other])
    try:
        formats.compare(*bases)
    except WrongBaseError:
        named = [f"'{b.name or 'unnamed'}' ({b.class_name})" for b in bases]
        return [
            "The adapters record different bases, other weights of one base, or weights that cannot be compared: "
            f"{listed(named)}."
        ]
    return []


def pair_in_one_form(
    one: StoredAdapter, other: StoredAdapter
) -> tuple[tuple[StoredAdapter, StoredAdapter], list[str]]:
    """Return two adapters with the layers that they share `in_one_form`, and notices: their bases, converted layers.

    Raises:
        AdapterFileError: PEFT's form cannot represent such a layer.
    """
    layers, converted = (dict(one.layers), dict(other.layers)), []
    for path in one.layers.keys() & other.layers.keys():
        layers[0][path], layers[1][path] = in_one_form([one.layers[path], other.layers[path]])
        if layers[0][path] is not one.layers[path]:
            converted.append(path)
    sentences = base_notices(one, other)
    if not converted:
        return (one, other), sentences
    sentences.append(
        f"{len(converted)} layers have different slices or groups in the two adapters, such as '{min(converted)}'. "
        "They are compared as whole layers."
    )
    return (replace(one, layers=layers[0]), replace(other, layers=layers[1])), sentences


def in_common(one: Mapping[str, Delta], other: Mapping[str, Delta]) -> tuple[list[str], list[str]]:
    """Return the names of the matrices that two adapters share, and notices about the others.

    Raises:
        AdapterFileError: They share none, or a shared one differs in shape.
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
                f"{shapes[1][1]} in the second: they are for different base models. Compare adapters of one base."
            )
    unshared = []
    for which, mine, theirs in (("first", one, other), ("second", other, one)):
        only_mine = [name for name in mine if name not in theirs]
        if only_mine:
            unshared.append(
                f"{len(only_mine)} matrices are only in the {which} adapter, such as '{only_mine[0]}'."
            )
    return shared, unshared


def notices(stored: StoredAdapter) -> list[str]:
    """Return sentences about the parts of an adapter that ``scaling * B A`` does not cover."""
    return [*factor_notices(stored), *other_notices(stored)]


def factor_notices(stored: StoredAdapter) -> list[str]:
    """Return sentences about what low-rank layers have besides A and B: DoRA's magnitudes, and biases of B."""
    sentences = []
    dora = sum(layer.magnitude is not None for layer in stored.layers.values())
    if dora:
        sentences.append(
            f"{dora} layers have DoRA magnitudes, which also scale the rows of the base: B A covers only the change "
            "of direction."
        )
    biases = sum(layer.B_bias is not None for layer in stored.layers.values())
    if biases:
        sentences.append(f"B has a bias in {biases} layers (lora_bias), which B A does not cover.")
    return sentences


def other_notices(stored: StoredAdapter) -> list[str]:
    """Return sentences about what an adapter has besides low-rank layers."""
    sentences = []
    if names := [*stored.module_tensors]:
        sentences.append(
            f"{len(names)} tensors of other methods than LoRA are not measured: {listed(names, 3)}."
        )
    if names := [*stored.trained]:
        sentences.append(f"{len(names)} parameters are also trained in full: {listed(names, 3)}.")
    return sentences


def parts_of(layer: StoredLayer) -> list[Factors]:
    """Return the layer's factors, one pair per slice or group (see the module's docstring)."""
    parts = layer.form.parts(layer.A, layer.B)
    if layer.initial_A is not None and layer.initial_B is not None:
        initial = layer.form.parts(layer.initial_A, layer.initial_B)
        parts = [
            (torch.cat([a, a0]), torch.cat([b, -b0], dim=1))
            for (a, b), (a0, b0) in zip(parts, initial, strict=True)
        ]
    return parts


def with_parts(layer: StoredLayer, parts: Sequence[Factors], scaling: float = 1.0) -> StoredLayer:
    """Return the layer with other factors of the same widths, and any rank common to all parts.

    The parts are the whole change: `parts_of` includes PiSSA's initial factors, so the result has none.
    """
    A = torch.cat([a for a, _ in parts]).unflatten(1, layer.A.shape[1:])
    B = torch.cat([b for _, b in parts])
    return replace(
        layer,
        A=A.contiguous(),
        B=B.view(*B.shape, *layer.B.shape[2:]).contiguous(),
        scaling=scaling,
        alpha=scaling * layer.form.rank(A),
        initial_A=None,
        initial_B=None,
    )


def weight_name(path: str, layer: StoredLayer) -> str:
    """Return the name of the base parameter that the layer's factors change."""
    return layer.form.weight_of(path)


def weight_parts(path: str, layer: StoredLayer, W: Tensor) -> list[Tensor]:
    """Return the base weight's matrices (out, in) to which the layer's parts are added; see `weight_matrix`."""
    return layer.form.weight_parts(weight_matrix(path, layer, W))


def weight_matrix(path: str, layer: StoredLayer, W: Tensor) -> Tensor:
    """Return a view (out, in) of the base weight as the matrix that the layer's factors change, in part or whole.

    Raises:
        AdapterFileError: The weight's shape does not match the adapter.
    """
    if not layer.grouped:
        raise AdapterFileError(
            f"The factors of '{path}' mix all input channels of a grouped convolution. The base's weight has no "
            "entries for such pairs of channels, so the two cannot be compared."
        )
    rows, columns = layer.form.out_features(layer.B), layer.A[0].numel()
    matrix = layer.form.matrix(W, (rows, columns))
    if matrix.shape != (rows, columns):
        raise AdapterFileError(
            f"The base's weight of '{path}' has shape {tuple(W.shape)}, but the adapter changes a matrix of "
            f"{rows} x {columns}. Name the base that the adapter was trained on: --base.name MODEL."
        )
    return matrix


def base_matrix(stored: StoredAdapter, delta: Delta, weights: Mapping[str, Tensor]) -> Tensor:
    """Return the base weight's matrix (out, in) to which `delta` is added.

    Raises:
        AdapterFileError: The weight's shape does not match the adapter.
        BaseModelError: The base lacks the weight.
    """
    layer = stored.layers[delta.path]
    W = weights[weight_name(delta.path, layer)]
    if layer.is_stacked and stored.peft_config and W.shape[-1] == W.shape[-2]:
        raise AdapterFileError(
            f"The experts of '{delta.path}' are square, and a file of PEFT does not record whether the base stores "
            "them as (out, in) or (in, out). Load the adapter on its base with lorakit.load and save it again."
        )
    return weight_parts(delta.path, layer, W)[delta.part]
