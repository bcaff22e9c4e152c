"""Compression gives the best approximation of each change, and reports its error."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from at_rest import same_bits
from sample_adapters import dense, dense_parts, factors, layers, linear, stored, trained_llama

from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.analysis import compress, compress_adapter
from lorakit.errors import AdapterFileError, ConfigurationError
from lorakit.methods.full import FullFineTuning


def best(change: torch.Tensor, rank: int) -> torch.Tensor:
    U, S, Vh = torch.linalg.svd(change.double(), full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:rank]


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_factors_are_the_best_approximation(rank):
    A, B = factors(6, 30, 40, seed=0)
    change = dense(A, B, -0.7)
    new_A, new_B, error = compress(A, B, -0.7, rank=np.int64(rank))
    assert (new_A.shape, new_B.shape) == ((rank, 30), (40, rank))
    assert new_A.dtype == torch.float32
    expected = best(change, rank)
    torch.testing.assert_close(dense(new_A, new_B), expected, rtol=0, atol=1e-6 * change.norm())
    left_out = (change - expected).norm() / change.norm()
    assert error == pytest.approx(float(left_out), rel=1e-6)
    # Both factors have the square roots of the singular values.
    torch.testing.assert_close(new_A @ new_A.T, new_B.T @ new_B, rtol=1e-4, atol=1e-4)


def test_energy_chooses_the_rank():
    A, B = factors(6, 30, 40, seed=0)
    squared = torch.linalg.svdvals(dense(A, B)).square()
    shares = squared.cumsum(0) / squared.sum()
    for energy in (0.3, 0.9, 0.999):
        new_A, _, error = compress(A, B, energy=energy)
        assert len(new_A) == int((shares < energy).sum()) + 1
        assert error <= math.sqrt(1 - energy)


def test_the_full_rank_is_exact():
    A, B = factors(6, 30, 40, seed=0)
    new_A, new_B, error = compress(A, B, 2.0, rank=6)
    torch.testing.assert_close(dense(new_A, new_B), dense(A, B, 2.0), rtol=0, atol=3e-6)
    assert error == 0


@pytest.mark.parametrize("name", layers())
def test_every_kind_of_layer(name):
    layer = layers()[name]
    adapter = stored(name)
    made = compress_adapter(adapter, rank=2)
    found = made.adapter.layers[name]
    before, after = dense_parts(layer), dense_parts(found)
    per_part = {"grouped": 1}.get(name, 2)
    for old, new in zip(before, after, strict=True):
        rank = min(per_part, *old.shape)
        torch.testing.assert_close(new, best(old, rank), rtol=0, atol=1e-5 * old.norm())
    residual = math.hypot(*(float((o - n).norm()) for o, n in zip(before, after, strict=True)))
    assert made.layers[name].residual == pytest.approx(residual, rel=1e-4, abs=1e-5)
    assert made.layers[name].rank == found.rank == 2
    for field in ("kind", "slices", "grouped", "transposed"):
        assert getattr(found, field) == getattr(layer, field)
    if layer.magnitude is not None:
        same_bits(found.magnitude, layer.magnitude)
        assert "DoRA" in made.notices[0]


def test_no_layer_exceeds_the_rank_unless_its_groups_need_more():
    for rank, expected in ((3, 2), (2, 2), (1, 2)):
        made = compress_adapter(stored("grouped"), rank=rank)
        assert made.adapter.layers["grouped"].rank == expected


@pytest.mark.parametrize("name", layers())
def test_a_rank_that_is_no_smaller_changes_no_bit(name):
    layer = layers()[name]
    made = compress_adapter(stored(name), rank=8)
    for field, tensor in made.adapter.layers[name].tensors.items():
        same_bits(tensor, layer.tensors[field], field)
    assert made.adapter.layers[name].scaling == layer.scaling
    assert made.error == 0


@pytest.mark.parametrize("name", layers())
def test_energy_keeps_at_least_its_share_of_every_layer(name):
    made = compress_adapter(stored(name), energy=0.8)
    for old, new in zip(
        dense_parts(layers()[name]), dense_parts(made.adapter.layers[name]), strict=True
    ):
        assert (old - new).norm() ** 2 <= 0.2 * old.norm() ** 2 * (1 + 1e-5)


def test_a_trained_adapter():
    adapter = trained_llama().stored()
    made = compress_adapter(adapter, rank=1)
    squares = [0.0, 0.0]
    for path, layer in adapter.layers.items():
        old, new = (dense_parts(x)[0] for x in (layer, made.adapter.layers[path]))
        squares[0] += float((old - new).norm() ** 2)
        squares[1] += float(old.norm() ** 2)
    assert made.error == pytest.approx(math.sqrt(squares[0] / squares[1]), rel=1e-4)
    assert made.adapter.method.rank == 1
    assert made.adapter.num_parameters == adapter.num_parameters // 4


def test_settings_say_what_the_layers_are():
    made = compress_adapter(stored("linear", "rslora", "fused"), energy=0.7)
    method = made.adapter.method
    for path, layer in made.adapter.layers.items():
        assert method.rank_of(path) == layer.rank
        assert method.alpha_of(path) == layer.alpha
        assert method.scaling_for(layer.rank, layer.alpha) == pytest.approx(layer.scaling)


def test_an_untrained_layer_stays_one():
    made = compress_adapter(stored(zero=linear(B=torch.zeros(20, 4))), energy=0.9)
    assert made.adapter.layers["zero"].rank == 1
    assert not dense_parts(made.adapter.layers["zero"])[0].any()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({}, "neither"),
        ({"rank": 2, "energy": 0.5}, "both"),
        ({"rank": 0}, "whole number"),
        ({"rank": 1.5}, "whole number"),
        ({"energy": 0.0}, "above 0"),
    ],
)
def test_targets_that_make_no_sense(target, message):
    with pytest.raises(ConfigurationError, match=message):
        compress_adapter(stored("linear"), **target)
    with pytest.raises(ConfigurationError, match=message):
        compress(*factors(4, 9, 9, seed=0), **target)


def test_what_cannot_be_compressed():
    whole = StoredAdapter(method=FullFineTuning(), trained={"weight": torch.ones(2, 2)})
    with pytest.raises(AdapterFileError, match="does not consist of low-rank factors"):
        compress_adapter(whole, rank=1)
    adapter = stored("linear")
    adapter.base_copies["linear.weight"] = torch.ones(20, 24)
    with pytest.raises(AdapterFileError, match="does not record whether they were trained"):
        compress_adapter(adapter, rank=1)
