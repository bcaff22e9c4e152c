"""Compare spectra with those of the dense float64 product, on random, trained and published adapters."""

from __future__ import annotations

import math

import pytest
import torch
from sample_adapters import (
    dense,
    dense_parts,
    factors,
    layers,
    linear,
    randn,
    stored,
    trained_llama,
)

from lorakit.adapters import formats
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.analysis import adapter_spectrum, compress_adapter, spectrum
from lorakit.analysis.spectrum import AdapterSpectrum, Spectrum
from lorakit.errors import AdapterFileError, ConfigurationError
from lorakit.methods.combined import Combined
from lorakit.methods.full import FullFineTuning
from lorakit.methods.lora import LoRA
from lorakit.methods.prefix import PrefixEmbedding


def reference(A: torch.Tensor, B: torch.Tensor, scaling: float = 1.0) -> torch.Tensor:
    return torch.linalg.svdvals(dense(A, B, scaling))[: A.shape[0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_singular_values_are_those_of_the_dense_product(dtype):
    A, B = (t.to(dtype) for t in factors(8, 60, 90, seed=0))
    found = spectrum(A, B, -1.5).singular_values
    # The factors' numbers are exact in float64, so only float64 rounding remains.
    torch.testing.assert_close(found, reference(A, B, -1.5), rtol=1e-10, atol=1e-12)


def test_factors_that_are_nearly_dependent_keep_their_small_singular_values():
    A, B = factors(4, 30, 40, seed=0)
    A[3] = A[2] + 1e-6 * A[3]  # squaring loses the last singular value: 1e-12 next to 1
    found = spectrum(A, B).singular_values
    torch.testing.assert_close(found, reference(A, B), rtol=1e-6, atol=0)


def test_rank_above_the_width():
    A, B = randn(8, 5, seed=0), randn(6, 8, seed=1)
    expected = torch.linalg.svdvals(dense(A, B))
    found = spectrum(A, B).singular_values
    torch.testing.assert_close(found, expected)


def test_ranks_by_their_definitions():
    # With orthonormal factors the singular values are exactly these.
    values = [3.0, 2.0, 2.0, 1.0]
    Q = torch.linalg.qr(randn(9, 4, seed=0).double()).Q
    found = spectrum(torch.diag(torch.tensor(values).double()) @ Q.T, Q)
    assert found.norm == pytest.approx(math.sqrt(18))
    p = [v / 8 for v in values]
    assert found.effective_rank == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)))
    assert found.stable_rank == pytest.approx(18 / 9)
    assert found.energy.tolist() == pytest.approx([9 / 18, 13 / 18, 17 / 18, 1])
    assert [found.rank_for(e) for e in (0.5, 0.51, 0.9, 0.95, 1.0)] == [1, 2, 3, 4, 4]


def test_an_untrained_adapter_has_no_rank():
    found = spectrum(randn(4, 9, seed=0), torch.zeros(8, 4), 2.0)
    assert (found.norm, found.effective_rank, found.stable_rank, found.rank_for(0.9)) == (
        0,
        0,
        0,
        0,
    )


@pytest.mark.parametrize("name", layers())
def test_every_kind_of_layer(name):
    layer = layers()[name]
    found = adapter_spectrum(stored(name)).layers
    parts = dense_parts(layer)
    assert len(found) == len(parts)
    for (label, one), change in zip(found.items(), parts, strict=True):
        assert label.startswith(name)
        values = one.singular_values
        expected = torch.linalg.svdvals(change)[: len(values)]
        torch.testing.assert_close(values[: len(expected)], expected, rtol=1e-6, atol=1e-6)


def test_names_tell_slices_and_groups_apart():
    names = list(adapter_spectrum(stored("fused", "grouped", "linear")).layers)
    assert names == [
        "fused rows 0:20",
        "fused rows 40:60",
        "grouped group 0",
        "grouped group 1",
        "linear",
    ]


def test_a_trained_adapter():
    adapter = trained_llama().stored()
    found = adapter_spectrum(adapter)
    total, kept = 0.0, torch.zeros(4).double()
    for path, layer in adapter.layers.items():
        expected = reference(layer.A, layer.B, layer.scaling)
        torch.testing.assert_close(
            found.layers[path].singular_values, expected, rtol=1e-8, atol=1e-12
        )
        kept += expected.square()
        total += float(expected.square().sum())
    assert found.norm == pytest.approx(math.sqrt(total))
    torch.testing.assert_close(found.energy, kept.cumsum(0) / total)
    assert found.rank_for(0.9) == int((found.energy < 0.9).sum()) + 1


def test_the_ranks_are_those_of_the_layers():
    """Not of a group's part of a convolution."""
    adapter = stored("linear", "fused", "grouped")
    found = adapter_spectrum(adapter)
    for name, one in found.layers.items():
        assert one.rank == adapter.layers[name.split()[0]].rank
    for energy in (0.3, 0.6, 0.9, 0.99, 1.0):
        rank = found.rank_for(energy)
        made = compress_adapter(adapter, rank=rank)
        kept = 1 - made.error**2
        assert kept >= energy - 1e-6
        if rank > 1:  # both groups together have a rank of 2 or more
            assert kept == pytest.approx(float(found.energy[rank - 1]), abs=1e-6)
        for name, one in found.layers.items():
            if name in adapter.layers:
                alone = compress_adapter(stored(name), rank=one.rank_for(energy))
                assert 1 - alone.error**2 >= energy - 1e-6
                assert alone.adapter.layers[name].rank == one.rank_for(energy)


def test_the_published_adapter(shared):
    path = shared / "checkpoints" / "roberta_base_lora_mnli.bin"
    found = adapter_spectrum(path, alpha=16)
    # Shares of the squared norm in the first singular value, and norms of B A, measured independently.
    shares = {0: 0.63, 4: 0.32, 9: 0.84, 10: 0.94, 11: 0.993}
    norms = {0: 4.8136, 4: 4.6199, 9: 6.9218, 10: 7.2132, 11: 6.3886}
    for i, share in shares.items():
        layer = found.layers[f"roberta.encoder.layer.{i}.attention.self.query"]
        assert float(layer.energy[0]) == pytest.approx(share, abs=0.005)
        assert layer.norm / 2 == pytest.approx(norms[i], abs=5e-5)
    assert len(found.layers) == 24
    assert "4 parameters are also trained in full" in found.notices[0]


def test_dora_is_not_passed_over_in_silence():
    assert "DoRA" in adapter_spectrum(stored("dora", "linear")).notices[0]


def test_modules_of_other_methods_are_not_passed_over_in_silence():
    combined = Combined(methods=(LoRA(), PrefixEmbedding()))
    modules = {"embed_tokens": {"prefix": torch.ones(2, 3)}}
    both = StoredAdapter(method=combined, layers=stored("linear").layers, modules=modules)
    assert adapter_spectrum(both).notices == [
        "1 tensors of other methods than LoRA are not measured: embed_tokens.prefix."
    ]


def test_json_holds_every_number():
    one, other = (Spectrum(torch.tensor(v).double()) for v in ([3.0, 2.0, 2.0, 1.0], [2.0]))
    facts = AdapterSpectrum(layers={"one": one, "other": other}, notices=["seen"]).to_json(0.7)
    assert facts["energy"] == 0.7
    assert facts["notices"] == ["seen"]
    assert facts["overall"] == {
        "norm": pytest.approx(math.sqrt(22)),
        "energy_by_rank": pytest.approx([13 / 22, 17 / 22, 21 / 22, 1]),
        "suggested_rank": 2,
    }
    assert facts["layers"]["one"] == {
        "rank": 4,
        "singular_values": [3, 2, 2, 1],
        "norm": pytest.approx(math.sqrt(18)),
        "effective_rank": pytest.approx(
            3.7467, abs=1e-4
        ),  # exp(-sum p log p), p = 3/8, 2/8, 2/8, 1/8
        "stable_rank": pytest.approx(18 / 9),
        "energy_by_rank": pytest.approx([9 / 18, 13 / 18, 17 / 18, 1]),
        "suggested_rank": 2,
    }
    assert facts["layers"]["other"]["suggested_rank"] == 1


@pytest.mark.parametrize(
    ("A", "B", "message"),
    [
        ((4, 9), (8, 3), r"A \(rank, in\) and B \(out, rank\)"),
        ((4,), (8, 4), "expected"),
        ((0, 9), (8, 0), "expected"),
    ],
)
def test_shapes_that_form_no_product(A, B, message):
    with pytest.raises(ConfigurationError, match=message):
        spectrum(torch.ones(A), torch.ones(B))


@pytest.mark.parametrize("energy", [0, -1, 1.1, float("nan")])
def test_an_energy_that_is_no_share(energy):
    with pytest.raises(ConfigurationError, match=r"above 0 and at most 1"):
        spectrum(*factors(4, 9, 9, seed=0)).rank_for(energy)


def test_full_fine_tuning_has_no_factors():
    whole = StoredAdapter(method=FullFineTuning(), trained={"weight": torch.ones(2, 2)})
    with pytest.raises(AdapterFileError, match="no low-rank factors"):
        adapter_spectrum(whole)


def test_matrices_come_in_the_order_of_the_blocks(tmp_path):
    names = [f"layers.{i}.q_proj" for i in (0, 1, 2, 10)]
    formats.write(stored(**{name: linear(i) for i, name in enumerate(names)}), tmp_path)
    assert list(adapter_spectrum(tmp_path).layers) == names
