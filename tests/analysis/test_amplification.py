"""Compare Table 7's quantities with dense float64 decompositions, and its random column with the formula."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from sample_adapters import (
    dense,
    factors,
    layers,
    linear,
    matrices,
    randn,
    stored,
    trained_llama,
    weight_shape,
)

from lorakit.analysis import (
    adapter_amplification,
    amplification,
    random_projection,
    similarity_to_base,
    subspace_similarity,
)
from lorakit.analysis.deltas import weight_name
from lorakit.errors import AdapterFileError, ConfigurationError


class Base(dict):
    """In-memory weights in place of a model on disk."""

    notices = ()


def reference(W: torch.Tensor, change: torch.Tensor, rank: int) -> dict[str, float]:
    W = W.double()
    U, S, Vh = torch.linalg.svd(change)
    own = torch.linalg.svdvals(W)[:rank]
    norm = torch.linalg.matrix_norm
    return {
        "rank": rank,
        "base_norm": float(norm(W)),
        "change_norm": float(S.norm()),
        "projected": float(norm(U[:, :rank].T @ W @ Vh[:rank].T)),
        "projected_own": float(own.norm()),
        "factor": float(S.norm() / norm(U[:, :rank].T @ W @ Vh[:rank].T)),
    }


def assert_equal(found, expected: dict[str, float]) -> None:
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-5), name


def test_random_matrices():
    W = randn(70, 50, seed=0)
    A, B = factors(6, 50, 70, seed=1)
    assert_equal(amplification(W, A, B, 0.7), reference(W, dense(A, B, 0.7), 6))


@pytest.mark.parametrize("rank", [1, 8])
def test_a_large_weight_is_decomposed_in_part(rank):
    W = randn(640, 700, seed=0)
    A, B = factors(rank, 700, 640, seed=1)
    assert_equal(amplification(W, A, B), reference(W, dense(A, B), rank))


def test_directions_beyond_the_rank_do_not_count():
    W = randn(30, 40, seed=0)
    A, B = factors(4, 40, 30, seed=1)
    B[:, 3] = 0
    assert_equal(amplification(W, A, B), reference(W, dense(A, B), 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_directions_of_factors_in_16_bits_count(dtype):
    """Their singular values fall to 2 % of the largest, which is below bfloat16's spacing times the factors' norms."""
    rank = 64
    W, A = randn(96, 80, seed=0), randn(rank, 80, seed=1)
    B = torch.linalg.qr(randn(96, rank, seed=2)).Q / torch.arange(1, rank + 1)
    A, B = A.to(dtype), B.to(dtype)
    assert_equal(amplification(W, A, B), reference(W, dense(A, B), rank))


def test_the_start_of_pissa_is_no_change():
    """In float64 the product of the factors and of their start cancels up to rounding."""
    A, B = factors(6, 50, 70, seed=1)
    with pytest.raises(ConfigurationError, match="B A is zero"):
        amplification(randn(70, 50, seed=0), torch.cat([A, A]), torch.cat([B, -B], dim=1))


def test_the_random_column():
    # Table 7: ||W_q|| is 61.95 for 12288 x 12288; 0.02 at r = 4 and 0.33 at r = 64.
    assert random_projection(4, 61.95, 12288, 12288) == pytest.approx(0.0202, abs=5e-5)
    assert random_projection(64, 61.95, 12288, 12288) == pytest.approx(0.323, abs=5e-4)
    W, (A, B) = randn(48, 36, seed=0), factors(4, 36, 48, seed=1)
    drawn = [amplification(W, A, B, seed=s) for s in range(300)]
    mean_square = sum(d.projected_random**2 for d in drawn) / len(drawn)
    assert math.sqrt(mean_square) == pytest.approx(drawn[0].expected_random, rel=0.05)
    assert drawn[0].projected_random == amplification(W, A, B, seed=0).projected_random


@pytest.mark.parametrize("name", layers())
def test_every_kind_of_layer(name):
    W = randn(*weight_shape(name), seed=99)
    found = adapter_amplification(stored(name), Base({weight_name(name, layers()[name]): W}))
    for one, (piece, change) in zip(found.layers.values(), matrices(name, W), strict=True):
        assert_equal(one, reference(piece, change, one.rank))


def test_a_trained_adapter_beside_its_base():
    handle = trained_llama()
    adapter = handle.stored()
    weights = Base(
        {f"{p}.weight": handle.model.get_submodule(p).weight.detach() for p in adapter.layers}
    )
    found = adapter_amplification(adapter, weights, only="q_proj")
    assert list(found.layers) == [p for p in adapter.layers if "q_proj" in p]
    for path, one in found.layers.items():
        layer = adapter.layers[path]
        change = dense(layer.A, layer.B, layer.scaling)
        assert_equal(one, reference(weights[f"{path}.weight"], change, 4))
    middle = {
        "over_random": [one.projected / one.expected_random for one in found.layers.values()],
        "of_own": [one.projected / one.projected_own for one in found.layers.values()],
        "factor": [one.change_norm / one.projected for one in found.layers.values()],
    }
    expected = {name: np.median(values) for name, values in middle.items()}
    assert found.to_json()["overall"] == pytest.approx(expected)


def test_a_base_that_is_zero_has_no_medians():
    handle = trained_llama()
    weights = Base(
        {
            f"{p}.weight": torch.zeros_like(handle.model.get_submodule(p).weight)
            for p in handle.stored().layers
        }
    )
    found = adapter_amplification(handle.stored(), weights, only="q_proj")
    assert found.to_json()["overall"] is None
    json.dumps(found.to_json(), allow_nan=False)


def test_similarity_to_the_base():
    W, (A, B) = randn(60, 50, seed=0), factors(3, 50, 60, seed=1)
    found = similarity_to_base(W, A, B, base_directions=0.2)
    expected = subspace_similarity(W.double(), dense(A, B))[:10, :3]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


START = {"A": randn(4, 24, seed=3), "B": randn(20, 4, seed=4)}
PISSA = START | {f"initial_{name}": factor for name, factor in START.items()}


@pytest.mark.parametrize("other", [linear(B=torch.zeros(20, 4)), linear(**PISSA)])
def test_an_untrained_matrix_is_named(other):
    """Of LoRA, where B starts at zero, or of PiSSA, where A and B start as directions of the base."""
    adapter = stored("linear", other=other)
    weights = Base({"linear.weight": randn(20, 24, seed=0), "other.weight": randn(20, 24, seed=1)})
    found = adapter_amplification(adapter, weights)
    assert list(found.layers) == ["linear"]
    assert found.notices == ["'other' is skipped: it is zero in the adapter."]
    with pytest.raises(AdapterFileError, match="never trained"):
        adapter_amplification(adapter, weights, only="other")


@pytest.mark.parametrize(
    ("only", "message"), [("key", "none of the 1 names"), ("(", "not a regular expression")]
)
def test_a_choice_that_chooses_nothing(only, message):
    with pytest.raises(ConfigurationError, match=message):
        adapter_amplification(stored("linear"), Base(), only=only)


def test_a_base_of_another_shape():
    with pytest.raises(AdapterFileError, match=r"has shape \(20, 23\).*20 x 24"):
        adapter_amplification(stored("linear"), Base({"linear.weight": randn(20, 23, seed=0)}))
    with pytest.raises(ConfigurationError, match="W has shape"):
        amplification(randn(3, 4, seed=0), *factors(2, 5, 3, seed=0))
    with pytest.raises(ConfigurationError, match="never trained"):
        amplification(randn(3, 5, seed=0), randn(2, 5, seed=0), torch.zeros(3, 2))
