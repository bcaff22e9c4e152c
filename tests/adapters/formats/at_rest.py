"""Stored adapters of every kind, with random numbers, for the tests of the formats."""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.adapters.formats.stored_layer import StoredLayer
from lorakit.methods.lora import LoRA
from lorakit.models.layers import RowSlice


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers, none of them zero."""
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape))
    values = torch.randn(*shape, generator=generator)
    return (values + values.sign() * 0.1).to(dtype)


def linear(n_in: int = 6, n_out: int = 8, rank: int = 2, alpha: float = 3.0, **more) -> StoredLayer:
    return StoredLayer(
        kind=more.pop("kind", "linear"),
        A=numbers(rank, n_in),
        B=numbers(n_out, rank),
        scaling=more.pop("scaling", alpha / rank),
        alpha=alpha,
        **more,
    )


def fused(
    *slices: RowSlice, n_in: int = 6, rank: int = 2, alpha: float = 3.0, **more
) -> StoredLayer:
    """A fused projection adapted by slices."""
    rows = sum(s.total for s in slices)
    return StoredLayer(
        kind=more.pop("kind", "linear"),
        A=numbers(rank * len(slices), n_in),
        B=numbers(rows, rank),
        scaling=alpha / rank,
        alpha=alpha,
        slices=slices,
        **more,
    )


def contiguous(width: int, *which: int, of: int = 3) -> tuple[RowSlice, ...]:
    """Equal slices one after the other, as GPT-2's c_attn has."""
    return tuple(
        RowSlice(groups=1, stride=of * width, offset=i * width, width=width) for i in which
    )


def interleaved(heads: int, width: int, *which: int) -> tuple[RowSlice, ...]:
    """Slices that alternate head by head, as GPT-NeoX's query_key_value has."""
    return tuple(
        RowSlice(groups=heads, stride=3 * width, offset=i * width, width=width) for i in which
    )


def convolution(
    n_in: int = 4,
    n_out: int = 6,
    rank: int = 2,
    kernel: tuple[int, ...] = (3, 3),
    groups: int = 1,
    alpha: float = 3.0,
    **more,
) -> StoredLayer:
    grouped = more.get("grouped", True)
    return StoredLayer(
        kind="conv",
        A=numbers(rank, n_in // groups if grouped else n_in, *kernel),
        B=numbers(n_out, rank // groups, *(1 for _ in kernel)),
        scaling=alpha / rank,
        alpha=alpha,
        **more,
    )


def embedding(count: int = 10, dim: int = 6, rank: int = 2, **more) -> StoredLayer:
    return StoredLayer(
        kind="embedding",
        A=numbers(rank, count),
        B=numbers(dim, rank),
        scaling=1.5,
        alpha=1.5 * rank,
        **more,
    )


def experts(count: int = 3, n_in: int = 4, n_out: int = 6, rank: int = 2, **more) -> StoredLayer:
    return StoredLayer(
        kind="experts",
        A=numbers(count * rank, n_in),
        B=numbers(count * n_out, rank),
        scaling=1.5,
        alpha=1.5 * rank,
        **more,
    )


def with_start(layer: StoredLayer) -> StoredLayer:
    """The layer with initial factors of PiSSA."""
    layer.initial_A = numbers(*layer.A.shape, seed=7)
    layer.initial_B = numbers(*layer.B.shape, seed=8)
    return layer


def with_dora(layer: StoredLayer) -> StoredLayer:
    """The layer with DoRA's magnitudes."""
    layer.magnitude = numbers(layer.B.shape[0]).abs()
    if layer.slices:
        layer.base_norms = numbers(layer.slices[0].groups * layer.slices[0].stride).abs()
    return layer


def adapter(layers: dict[str, StoredLayer], **more) -> StoredAdapter:
    """An adapter of these layers; its method matches them."""
    settings = {
        "rank": next(iter(layers.values())).rank,
        "alpha": next(iter(layers.values())).alpha,
        "targets": tuple(layers),
        "dora": any(layer.magnitude is not None for layer in layers.values()),
        "lora_bias": any(layer.B_bias is not None for layer in layers.values()),
        **more.pop("settings", {}),
    }
    return StoredAdapter(method=LoRA(**settings), layers=layers, **more)


def assert_equal(found: StoredAdapter, expected: StoredAdapter) -> None:
    """Assert that two adapters are equal, bit for bit."""
    assert found.method == expected.method
    assert list(found.layers) == list(expected.layers)
    for path, layer in expected.layers.items():
        other = found.layers[path]
        assert other.tensors.keys() == layer.tensors.keys(), path
        for name, tensor in layer.tensors.items():
            same_bits(other.tensors[name], tensor, f"{path}.{name}")
        for name in ("kind", "scaling", "alpha", "slices", "grouped", "transposed", "tied_head"):
            assert getattr(other, name) == getattr(layer, name), (path, name)
        assert other.rank == layer.rank
    assert found.trained.keys() == expected.trained.keys()
    for name, tensor in expected.trained.items():
        same_bits(found.trained[name], tensor, name)
    assert found.base == expected.base
    assert found.provenance == expected.provenance


def same_bits(found: Tensor, expected: Tensor, what: str = "") -> None:
    assert found.dtype == expected.dtype, what
    assert found.shape == expected.shape, what
    assert found.contiguous().view(torch.uint8).equal(expected.contiguous().view(torch.uint8)), what


def delta(layer: StoredLayer) -> Tensor:
    """``scaling * (B A - B0 A0)`` in float64, written out index by index from the definition."""
    total = product(layer, layer.A, layer.B)
    if layer.initial_A is not None and layer.initial_B is not None:
        total = total - product(layer, layer.initial_A, layer.initial_B)
    return layer.scaling * total


def product(layer: StoredLayer, A: Tensor, B: Tensor) -> Tensor:
    A, B = A.double(), B.double()
    if layer.slices:
        out = torch.zeros(layer.slices[0].groups * layer.slices[0].stride, A.shape[1]).double()
        row = 0
        for i, piece in enumerate(layer.slices):
            for g in range(piece.groups):
                for j in range(piece.width):
                    own = A[i * layer.rank : (i + 1) * layer.rank]
                    out[g * piece.stride + piece.offset + j] = B[row] @ own
                    row += 1
        return out
    if layer.kind == "experts":
        count = len(A) // B.shape[1]
        pairs = zip(A.chunk(count), B.chunk(count), strict=True)
        return torch.cat([b @ a for a, b in pairs])
    if layer.kind == "conv":
        per_group = B.shape[1]
        rows = []
        for o in range(B.shape[0]):
            group = o // (B.shape[0] // layer.groups)
            mine = A[group * per_group : (group + 1) * per_group]
            kernel = torch.einsum("r,r...->...", B[o].flatten(), mine)
            if layer.grouped and layer.groups > 1:  # the other groups' channels have no weight
                wide = torch.zeros(layer.groups * A.shape[1], *A.shape[2:]).double()
                wide[group * A.shape[1] : (group + 1) * A.shape[1]] = kernel
                kernel = wide
            rows.append(kernel)
        return torch.stack(rows)
    return B @ A
