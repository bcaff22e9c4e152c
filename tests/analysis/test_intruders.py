"""Compare intruders with those of full float64 decompositions, for full and partial decompositions."""

from __future__ import annotations

import pytest
import torch
from sample_adapters import layers, linear, matrices, randn, stored, trained_llama, weight_shape

from lorakit.analysis import adapter_intruders, intruders
from lorakit.analysis.deltas import deltas_of, weight_name
from lorakit.analysis.intruders import largest_cosine_bound
from lorakit.errors import ConfigurationError


class Base(dict):
    """In-memory weights in place of a model on disk."""

    notices = ()


def reference(W: torch.Tensor, adapted: torch.Tensor, top: int) -> torch.Tensor:
    """Return the largest cosine of each leading vector with all of the base's (algorithm 1 of the paper)."""
    base = torch.linalg.svd(W.double(), full_matrices=False).U
    own = torch.linalg.svd(adapted.double(), full_matrices=False).U
    return (base.T @ own[:, :top]).abs().amax(0)


def pair(rows: int, columns: int, strength: float, rank: int = 4):
    """Return a random weight and a copy changed along random directions, intruders if the change is strong."""
    W = randn(rows, columns, seed=0) / columns**0.5
    A, B = randn(rank, columns, seed=1) / columns**0.5, randn(rows, rank, seed=2) / rows**0.5
    return W, W + strength * B @ A


@pytest.mark.slow
@pytest.mark.parametrize("strength", [0.1, 2.0, 6.0])
@pytest.mark.parametrize("shape", [(60, 60), (40, 90), (90, 40), (600, 640), (700, 560)])
def test_random_weights(shape, strength):
    W, adapted = pair(*shape, strength)
    found = intruders(W, adapted)
    exact = reference(W, adapted, 10)
    assert torch.equal(found.is_intruder, exact < 0.5)
    # `cosine` and `bound` bracket the exact cosine. Float32 rounding mixes vectors with close singular
    # values, by up to 1e-3 here.
    assert (found.cosine <= exact + 2e-3).all()
    assert (found.bound >= exact - 2e-3).all()
    assert found.count >= 4 if strength > 1 else found.count == 0


@pytest.mark.parametrize("shape", [(80, 80), (60, 90), (90, 60)])
def test_the_bound_is_never_below_the_largest_cosine(shape):
    W = randn(*shape, seed=0).double()
    U = torch.linalg.svd(W, full_matrices=False).U
    mixed = 0.9 * U[:, 5] + (1 - 0.9**2) ** 0.5 * U[:, 20]
    spread = torch.nn.functional.normalize(randn(shape[0], seed=1).double(), dim=0)
    outside = torch.linalg.svd(W).U[:, -1]
    vectors = torch.stack([U[:, 3], mixed, spread, outside], dim=1)
    exact = (U.T @ vectors).abs().amax(0)
    bound = largest_cosine_bound(W, vectors, enough=0)
    assert (bound >= exact - 1e-9).all()
    # With as many steps as dimensions the bound is nearly tight.
    torch.testing.assert_close(bound[:2], exact[:2], atol=0.02, rtol=0)
    assert bound[2] < 0.7
    if shape[0] > shape[1]:
        assert bound[3] < 1e-6  # a direction outside the base's range matches none of its vectors


def test_a_verdict_at_the_threshold_takes_the_full_decomposition(monkeypatch):
    W, adapted = pair(600, 640, 2.0)
    exact = reference(W, adapted, 10)
    threshold = float(exact.min()) * 1.05  # too close for the bound to decide
    calls = []
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: calls.append(1) or svd(*a, **k))
    found = intruders(W, adapted, threshold=threshold)
    assert calls
    assert torch.equal(found.is_intruder, exact < threshold)


def test_an_adapter_that_does_nothing_has_none():
    W = randn(600, 600, seed=0)
    found = intruders(W, W.clone())
    assert found.count == 0
    torch.testing.assert_close(found.cosine, torch.ones(10), atol=1e-3, rtol=0)


def test_a_trained_adapter_beside_its_base():
    handle = trained_llama()
    adapter = handle.stored()
    base = {p: handle.model.get_submodule(p).weight.detach().clone() for p in adapter.layers}
    found = adapter_intruders(adapter, Base({f"{p}.weight": W for p, W in base.items()}), top=5)
    handle.merge()
    try:
        merged = {p: handle.model.get_submodule(p).weight.detach().clone() for p in adapter.layers}
    finally:
        handle.unmerge()
    assert found.layers.keys() == adapter.layers.keys()
    facts = found.to_json()
    for path, one in found.layers.items():
        exact = reference(base[path], merged[path], 5).float()
        torch.testing.assert_close(one.cosine, exact, atol=1e-3, rtol=0)
        assert facts["layers"][path]["cosine"] == one.cosine.tolist()
    assert facts["overall"] == {"count": found.count, "examined": 5 * len(base)}


@pytest.mark.parametrize("name", layers())
def test_every_kind_of_layer_is_adapted_as_when_it_is_merged(name):
    W = randn(*weight_shape(name), seed=99)
    found = adapter_intruders(stored(name), Base({weight_name(name, layers()[name]): W}), top=3)
    magnitude = layers()[name].magnitude
    for one, (piece, change) in zip(found.layers.values(), matrices(name, W), strict=True):
        merged = piece.double() + change
        if magnitude is not None:
            merged *= magnitude[:, None] / merged.norm(dim=1, keepdim=True)
        exact = reference(piece, merged, 3).float()
        torch.testing.assert_close(one.cosine, exact, atol=1e-4, rtol=0)


def test_dora_scales_the_rows():
    layer = layers()["dora"]
    W = randn(20, 24, seed=99)
    adapted = deltas_of(stored("dora"))["dora"].added_to(W)
    merged = W + layer.scaling * layer.B @ layer.A
    expected = layer.magnitude[:, None] * merged / merged.norm(dim=1, keepdim=True)
    torch.testing.assert_close(adapted, expected)
    torch.testing.assert_close(adapted.norm(dim=1), layer.magnitude)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"top": 0}, "at least 1"), ({"threshold": 0}, "cosine"), ({"threshold": 1.5}, "cosine")],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        intruders(torch.eye(3), torch.eye(3), **settings)
    with pytest.raises(ConfigurationError, match="equal shape"):
        intruders(torch.eye(3), torch.eye(4))


def test_a_zero_layer_is_looked_at_like_any_other():
    adapter = stored(linear=linear(B=torch.zeros(20, 4)))
    found = adapter_intruders(adapter, Base({"linear.weight": randn(20, 24, seed=0)}))
    assert found.count == 0
