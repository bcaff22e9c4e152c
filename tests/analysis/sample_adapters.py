"""Sample adapters: every kind of stored layer, and an adapter trained for a few steps."""

from __future__ import annotations

import functools

import at_rest
import tiny_models
import torch
from torch import Tensor

import lorakit
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.adapters.formats.stored_layer import StoredLayer
from lorakit.methods.lora import LoRA
from lorakit.models.layers import RowSlice


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factors(rank: int, n_in: int, n_out: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return A and B with decaying singular values, as after training."""
    falling = 0.6 ** torch.arange(rank)
    A, B = randn(rank, n_in, seed=seed), randn(n_out, rank, seed=seed + 1)
    return A * falling[:, None], B


def linear(seed: int = 0, **settings) -> StoredLayer:
    A, B = factors(4, 24, 20, seed)
    return StoredLayer(
        **{"kind": "linear", "A": A, "B": B, "scaling": 2.0, "alpha": 8.0} | settings
    )


def layers() -> dict[str, StoredLayer]:
    """Return one layer of each kind and option, by name."""
    q, v = (RowSlice(groups=1, stride=60, offset=offset, width=20) for offset in (0, 40))
    heads = RowSlice(groups=4, stride=15, offset=5, width=5)
    A, B = factors(8, 24, 40, 10)
    start_A, start_B = factors(4, 24, 20, 30)
    conv = {"kind": "conv", "scaling": 0.5, "alpha": 2.0}
    return {
        "linear": linear(1),
        "rslora": linear(2, scaling=4.0),
        "negative": linear(3, scaling=-1.0),
        "conv1d": linear(4, transposed=True),
        "dora": linear(5, magnitude=1 + randn(20, seed=6).abs()),
        "pissa": linear(7, initial_A=start_A, initial_B=start_B),
        "fused": linear(8, A=A, B=B[:, :4], slices=(q, v)),
        "interleaved": linear(9, B=randn(20, 4, seed=9), slices=(heads,)),
        "attention": linear(11, kind="attention", B=randn(72, 4, seed=11)),
        "embedding": linear(12, kind="embedding", A=randn(4, 50, seed=12)),
        "conv": StoredLayer(**conv, A=randn(4, 6, 3, 3, seed=13), B=randn(8, 4, 1, 1, seed=14)),
        "grouped": StoredLayer(**conv, A=randn(4, 3, 3, seed=15), B=randn(8, 2, 1, seed=16)),
        "experts": linear(19, kind="experts", A=randn(12, 24, seed=19), B=randn(60, 4, seed=20)),
    }


def stored(*names: str, **more: StoredLayer) -> StoredAdapter:
    """Return an adapter with these `layers`, by default all."""
    found = layers()
    chosen = {name: found[name] for name in names or (() if more else found)} | more
    return StoredAdapter(method=LoRA(targets=tuple(chosen)), layers=chosen)


def weight_shape(name: str) -> tuple[int, ...]:
    """Return the shape of the base weight of one of `layers`, as its module stores it."""
    if name in ("fused", "interleaved"):
        return (60, 24)
    special = {
        "conv1d": (24, 20),
        "embedding": (50, 20),
        "attention": (72, 24),
        "conv": (8, 6, 3, 3),
    }
    special |= {"grouped": (8, 3, 3), "experts": (3, 20, 24)}
    return special.get(name, (20, 24))


@functools.cache
def trained_llama(seed: int = 0, rank: int = 4, **settings) -> lorakit.Adapters:
    """Return a tiny Llama with an adapter that was trained on one batch for some steps."""
    model = tiny_models.build("llama")
    method = lorakit.LoRA(rank=rank, alpha=2 * rank, targets="all-linear", **settings)
    handle = lorakit.attach(model, method, name="trained", seed=seed)
    batch = tiny_models.example_batch("llama", model, padding=0)
    optimizer = torch.optim.Adam(handle.trainable_parameters(), lr=1e-2)
    for _ in range(8):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return handle


def dense(A: Tensor, B: Tensor, scaling: float = 1.0) -> Tensor:
    """Return the dense product in float64."""
    return scaling * (B.double() @ A.double())


def dense_parts(layer: StoredLayer) -> list[Tensor]:
    """Return the layer's changes as dense float64 matrices, from the definition of each kind."""
    change = at_rest.delta(layer)
    if layer.slices:
        return [change[piece.rows()] for piece in layer.slices]
    if layer.kind in ("conv", "experts"):
        return list(change.flatten(1).chunk(layer.groups))
    return [change]


def matrices(name: str, W: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the matrices of a base weight that one of `layers` changes, each with its change in float64."""
    layer, changes = layers()[name], dense_parts(layers()[name])
    matrix = W.T if name in ("conv1d", "embedding") else W.flatten(1)
    pieces = [matrix[piece.rows()] for piece in layer.slices] or list(matrix.chunk(layer.groups))
    if name == "experts":
        pieces = list(W)
    if name == "grouped":  # a group's factors see only its own channels
        changes = [c[:, c.abs().sum(0) > 0] for c in changes]
    return list(zip(pieces, changes, strict=True))
