"""Compare subspace similarity with its definition on dense float64 decompositions, and with random levels."""

from __future__ import annotations

import pytest
import torch
from sample_adapters import dense_parts, layers, linear, randn, stored, trained_llama

from lorakit.adapters.formats.peft.factors import to_peft
from lorakit.analysis import adapter_similarity, random_level, subspace_similarity
from lorakit.errors import AdapterFileError, ConfigurationError


def reference(A1: torch.Tensor, A2: torch.Tensor) -> torch.Tensor:
    """Compute equation 4 entry by entry, with the directions from a dense decomposition."""
    U1, U2 = (torch.linalg.svd(A.double(), full_matrices=True).Vh.T for A in (A1, A2))
    phi = torch.empty(len(A1), len(A2)).double()
    for i in range(1, len(A1) + 1):
        for j in range(1, len(A2) + 1):
            norm = torch.linalg.matrix_norm(U1[:, :i].T @ U2[:, :j])
            phi[i - 1, j - 1] = norm**2 / min(i, j)
    return phi


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_random_matrices(dtype):
    A1, A2 = randn(3, 40, seed=0).to(dtype), randn(8, 40, seed=1).to(dtype)
    A2[0] += 5 * A1[0]  # a direction in common
    found = subspace_similarity(A1, A2)
    torch.testing.assert_close(found, reference(A1, A2), rtol=1e-9, atol=1e-12)
    assert found[2, 7] > 0.3  # at random, 8 / 40
    torch.testing.assert_close(subspace_similarity(A2, A1), found.T)


def test_small_directions_of_16_bit_factors_count():
    fall = (0.8 ** torch.arange(32))[:, None]
    A1, A2 = ((fall * randn(32, 80, seed=seed)).bfloat16() for seed in (0, 1))
    torch.testing.assert_close(subspace_similarity(A1, A2), reference(A1, A2))


def test_extremes():
    A = randn(4, 20, seed=0)
    torch.testing.assert_close(subspace_similarity(A, -3 * A).diagonal(), torch.ones(4).double())
    inside = A[:, :10].clone()
    one, other = torch.zeros(2, 20), torch.zeros(2, 20)
    one[:, :10], other[:, 10:] = inside[:2], inside[2:]
    assert subspace_similarity(one, other).abs().max() < 1e-14


def test_random_matrices_meet_the_random_level():
    # The mean of 2000 draws; its standard error is largest at (1, 1), sqrt(2 / 2000) = 3 % of it.
    draws = [
        subspace_similarity(randn(4, 64, seed=2 * i), randn(9, 64, seed=2 * i + 1))
        for i in range(2000)
    ]
    mean = torch.stack(draws).mean(0)
    torch.testing.assert_close(mean, random_level(4, 9, 64), rtol=0.12, atol=0)
    assert random_level(64, 64, 12288)[-1, -1] == pytest.approx(0.0052, abs=5e-5)


def test_there_are_no_directions_beyond_the_rank():
    A1, A2 = randn(4, 20, seed=0), randn(3, 20, seed=1)
    A1[3] = 2 * A1[0]
    phi = subspace_similarity(A1, A2)
    assert phi[3].isnan().all()
    torch.testing.assert_close(phi[:3], reference(A1, A2)[:3])


def test_trained_adapters_of_two_ranks_and_of_two_seeds():
    small, large, seed = (
        trained_llama(rank=2).stored(),
        trained_llama().stored(),
        trained_llama(1).stored(),
    )
    for first, second in ((small, large), (large, seed)):
        found = adapter_similarity(first, second)
        assert found.A.keys() == found.B.keys() == first.layers.keys()
        for path, mine in first.layers.items():
            theirs = second.layers[path]
            torch.testing.assert_close(found.A[path].phi, reference(mine.A, theirs.A))
            torch.testing.assert_close(found.B[path].phi, reference(mine.B.T, theirs.B.T))
            assert found.A[path].width == mine.A.shape[1]
            assert found.B[path].width == mine.B.shape[0]
    # Training hardly moves A: equal seeds stay similar, other seeds are unrelated.
    same = adapter_similarity(large, large)
    assert min(s.whole for s in same.A.values()) > 0.999
    other = adapter_similarity(large, seed)
    assert max(s.whole for s in other.A.values()) < 0.6


def test_slices_are_compared_with_their_like():
    found = adapter_similarity(stored("fused", "linear"), stored("fused"))
    assert list(found.A) == ["fused rows 0:20", "fused rows 40:60"]
    assert found.A["fused rows 0:20"].first == pytest.approx(1)
    assert "1 matrices are only in the first adapter, such as 'linear'" in found.notices[0]


@pytest.mark.parametrize("name", ["fused", "grouped"])
def test_one_adapter_in_two_forms_is_the_same(name):
    both = stored(name, "linear"), stored("linear", **{name: to_peft(layers()[name])})
    one, other = adapter_similarity(*both), adapter_similarity(*both[::-1])
    assert one.A.keys() == other.A.keys()
    assert min(s.whole for s in (*one.A.values(), *one.B.values())) > 1 - 1e-9
    assert "compared as whole layers" in one.notices[0]


def test_pissa_is_compared_by_its_change():
    """A and B of both adapters are mostly their common start."""
    start = {"initial_A": 5 * randn(2, 64, seed=0), "initial_B": 5 * randn(64, 2, seed=1)}

    def updated(seed: int):
        A = start["initial_A"] + 0.02 * randn(2, 64, seed=seed)
        B = start["initial_B"] + 0.02 * randn(64, 2, seed=seed + 1)
        return stored(linear=linear(A=A, B=B, **start))

    found = adapter_similarity(updated(2), updated(4))
    change = [dense_parts(adapter.layers["linear"])[0] for adapter in (updated(2), updated(4))]
    for sides, (one, other) in ((found.A, change), (found.B, [c.T for c in change])):
        expected = reference(one, other)[:4, :4]
        torch.testing.assert_close(sides["linear"].phi, expected, rtol=1e-4, atol=1e-6)
    (notice,) = found.notices
    assert "1 matrices of both adapters start from directions of the base (PiSSA)" in notice
    plain = linear(A=randn(2, 64, seed=6), B=randn(64, 2, seed=7))
    assert adapter_similarity(updated(2), stored(linear=plain)).notices == []
    # An expert without tokens stays at its start.
    same = linear(A=start["initial_A"], B=start["initial_B"], **start)
    both = [
        stored(linear=adapter.layers["linear"], unused=same) for adapter in (updated(2), updated(4))
    ]
    found = adapter_similarity(*both)
    assert list(found.A) == ["linear"]
    assert "'unused' is skipped: it is zero in one of the adapters." in found.notices
    with pytest.raises(AdapterFileError, match="zero in one of the adapters"):
        adapter_similarity(updated(2), stored(linear=same))


def test_json():
    facts = adapter_similarity(stored("linear"), stored("linear")).to_json()
    layer = facts["layers"]["linear"]["A"]
    assert layer["phi"][0][0] == pytest.approx(1)
    assert layer["random_1_1"] == pytest.approx(1 / 24)
    assert layer["random_whole"] == pytest.approx(4 / 24)


def test_the_medians_of_all_matrices():
    one = {f"l.{n}": linear(n) for n in range(3)}
    other = {f"l.{n}": linear(n + 10) for n in range(3)}
    found = adapter_similarity(stored(**one), stored(**other))
    facts = found.to_json()
    for side in "AB":
        layers = [layer[side] for layer in facts["layers"].values()]
        for key, value in facts["overall"][side].items():
            assert value == sorted(layer[key] for layer in layers)[1]
    phi = sorted(float(reference(one[name].A, other[name].A)[0, 0]) for name in one)
    assert found.overall["A"]["phi_1_1"] == pytest.approx(phi[1])


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (stored("linear"), stored("conv"), "no matrix in common"),
        (stored("linear"), stored(linear=linear(A=randn(4, 9, seed=0))), "20 x 24 in the first"),
        (stored("linear"), stored(linear=linear(B=torch.zeros(20, 4))), "Name two trained"),
        (
            stored(q=linear(), v=linear(B=torch.zeros(20, 4))),
            stored(q=linear(B=torch.zeros(20, 4)), v=linear()),
            "All shared matrices are zero in one of the adapters",
        ),
    ],
)
def test_adapters_that_cannot_be_compared(first, second, message):
    with pytest.raises(AdapterFileError, match=message):
        adapter_similarity(first, second)


@pytest.mark.parametrize(
    ("A1", "A2", "message"),
    [
        (torch.ones(2, 3), torch.ones(2, 4), "same width"),
        (torch.ones(3), torch.ones(2, 3), "same width"),
        (torch.zeros(2, 3), torch.ones(2, 3), "never trained"),
    ],
)
def test_matrices_that_cannot_be_compared(A1, A2, message):
    with pytest.raises(ConfigurationError, match=message):
        subspace_similarity(A1, A2)
