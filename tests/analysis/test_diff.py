"""Compare distances and angles with those of the dense float64 changes."""

from __future__ import annotations

import dataclasses
import math
import shutil

import at_rest
import pytest
import tiny_models
import tiny_runs
import torch
from random_adapters import randomise
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

import lorakit
from lorakit.adapters import formats
from lorakit.adapters.formats.peft.factors import to_peft
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.analysis import adapter_diff, difference
from lorakit.errors import AdapterFileError, ConfigurationError
from lorakit.methods.bitfit import BitFit
from lorakit.methods.full import FullFineTuning
from lorakit.methods.lora import LoRA
from lorakit.training.loop import train


def assert_difference(found, one: torch.Tensor, other: torch.Tensor) -> None:
    one, other = one.double(), other.double()
    assert found.first == pytest.approx(float(one.norm()), rel=1e-8)
    assert found.second == pytest.approx(float(other.norm()), rel=1e-8)
    assert found.distance == pytest.approx(float((one - other).norm()), rel=1e-7, abs=1e-12)
    cosine = float((one * other).sum() / one.norm() / other.norm())
    assert found.angle == pytest.approx(math.degrees(math.acos(cosine)), rel=1e-5)


def test_random_changes_of_two_ranks():
    (A1, B1), (A2, B2) = factors(3, 20, 30, seed=0), factors(5, 20, 30, seed=2)
    found = difference((A1, B1, 2.0), (A2, B2, -0.5))
    assert_difference(found, dense(A1, B1, 2.0), dense(A2, B2, -0.5))
    assert found.relative == pytest.approx(found.distance / found.first)


def test_small_angles_keep_their_digits():
    A, B = (t.double() for t in factors(3, 20, 30, seed=0))
    change = dense(A, B)
    turned = 1e-6 * dense(A, randn(30, 3, seed=5))
    turned -= (
        (turned * change).sum() / change.square().sum() * change
    )  # at a right angle to the change
    U, S, Vh = torch.linalg.svd(change + turned, full_matrices=False)
    other = (S[:6, None] * Vh[:6], U[:, :6], 1.0)
    expected = math.degrees(math.atan(float(turned.norm() / change.norm())))
    assert difference((A, B, 1.0), other).angle == pytest.approx(expected, rel=1e-3)


def test_the_same_change_twice_is_at_distance_zero():
    A, B = factors(3, 20, 30, seed=0)
    found = difference((A, B, 2.0), (A, B, 2.0))
    assert (found.distance, found.relative, found.angle) == (0, 0, 0)
    opposite = difference((A, B, 2.0), (A, B, -2.0))
    assert opposite.angle == pytest.approx(180)
    # Other factors of the same product differ only by rounding.
    assert difference((A, B, 2.0), (2 * A, B, 1.0)).relative < 1e-12


def test_nothing_has_no_direction():
    A, B = factors(3, 20, 30, seed=0)
    found = difference((A, torch.zeros_like(B), 1.0), (A, B, 1.0))
    assert found.angle is None
    assert found.relative == math.inf
    assert found.to_json()["relative"] is None


@pytest.mark.parametrize("name", layers())
def test_every_kind_of_layer(name):
    layer = layers()[name]
    other = stored(name)
    other.layers[name].A = 1.5 * layer.A + 0.1
    found = adapter_diff(stored(name), other)
    pairs = zip(dense_parts(layer), dense_parts(other.layers[name]), strict=True)
    for one, (before, after) in zip(found.layers.values(), pairs, strict=True):
        assert_difference(one, before, after)


def test_trained_adapters_of_two_seeds():
    first, second = trained_llama().stored(), trained_llama(1).stored()
    found = adapter_diff(first, second)
    changes = []
    for path, layer in first.layers.items():
        changes.append((dense_parts(layer)[0], dense_parts(second.layers[path])[0]))
        assert_difference(found.layers[path], *changes[-1])
    whole = [torch.cat([pair[i].flatten() for pair in changes]) for i in (0, 1)]
    assert_difference(found.overall, *whole)
    distances = [found.layers[name].distance for name in found.most_moved()]
    assert distances == sorted(distances, reverse=True)


def test_what_one_adapter_has_alone_counts_against_zero():
    found = adapter_diff(stored("linear", "fused"), stored("linear"))
    alone = found.layers["fused rows 0:20"]
    assert alone.second == 0
    assert alone.distance == pytest.approx(alone.first)
    assert "2 matrices are only in the first adapter" in found.notices[0]


@pytest.mark.parametrize("name", ["fused", "interleaved", "grouped"])
def test_one_adapter_in_two_forms_is_at_distance_zero(name):
    """PEFT has one pair of factors for the slices of a layer, and for the groups of a convolution."""
    both = stored(name), stored(**{name: to_peft(layers()[name])})
    for one, other in (both, both[::-1]):
        found = adapter_diff(one, other)
        assert found.overall.first == pytest.approx(float(at_rest.delta(layers()[name]).norm()))
        assert found.overall.relative < 1e-7
        assert (
            f"1 layers have different slices or groups in the two adapters, such as '{name}'"
            in (found.notices[0])
        )


def test_magnitudes_of_slices_and_of_all_rows():
    fused = layers()["fused"]
    norms = randn(60, seed=1).abs()
    fused = dataclasses.replace(fused, magnitude=randn(40, seed=2).abs(), base_norms=norms)
    found = adapter_diff(stored(fused=fused), stored(fused=to_peft(fused)))
    assert found.trained["fused.magnitude"].distance == 0


def test_nothing_in_common():
    both = [
        StoredAdapter(method=method, trained={name: torch.ones(2)})
        for method, name in ((FullFineTuning(), "weight"), (BitFit(), "bias"))
    ]
    with pytest.raises(AdapterFileError, match=r"nothing in common.*'bias' is trained"):
        adapter_diff(*both)


def test_parts_trained_in_full():
    one, other = stored("dora"), stored("dora")
    other.layers["dora"].magnitude = other.layers["dora"].magnitude + 1
    one.trained["head.weight"] = torch.ones(3, 4)
    other.trained["head.weight"] = torch.full((3, 4), 3.0)
    other.trained["bias"] = torch.ones(2)
    found = adapter_diff(one, other)
    assert found.trained["head.weight"].distance == pytest.approx(2 * math.sqrt(12))
    assert found.trained["dora.magnitude"].distance == pytest.approx(math.sqrt(20), rel=1e-6)
    assert sum("1 layers have DoRA magnitudes" in notice for notice in found.notices) == 1
    assert "'bias' is trained in full only in the second adapter." in found.notices
    other.trained["head.weight"] = torch.ones(5, 4)
    with pytest.raises(AdapterFileError, match=r"has shape \(3, 4\) in the first"):
        adapter_diff(one, other)


def test_full_fine_tuning():
    tensors = [randn(3, 4, seed=i) for i in (0, 1)]
    one, other = (
        StoredAdapter(method=FullFineTuning(), trained={"weight": tensor}) for tensor in tensors
    )
    found = adapter_diff(one, other)
    assert found.layers == {}
    assert_difference(found.trained["weight"], *tensors)


def test_checkpoints_of_a_run(tmp_path):
    base = tiny_runs.save_base(tmp_path / "base")
    method = LoRA(rank=2, alpha=4, targets=("attention.qv",), bias="none")
    config = tiny_runs.config(tmp_path, base, lora=method, max_steps=6)
    run = train(config).folder
    steps = sorted((run / "checkpoints").iterdir())
    early, late = steps[0], steps[-1]
    found = adapter_diff(early, late)
    assert found.notices == []
    assert 0 < found.overall.distance < found.overall.first + found.overall.second
    # The last checkpoint equals the adapter folder.
    assert adapter_diff(late, run / "adapter").overall.distance == 0

    # Without the files of adapter/, those of best/ describe the checkpoints.
    shutil.rmtree(run / "adapter")
    (run / "adapter").mkdir()
    assert adapter_diff(early, late).overall == found.overall
    shutil.rmtree(run / "best")
    with pytest.raises(AdapterFileError, match="saved no adapter yet"):
        adapter_diff(early, late)


@pytest.mark.slow
def test_a_checkpoint_of_another_run(tmp_path):
    base = tiny_runs.save_base(tmp_path / "base")
    runs = []
    for name, targets in (("one", ("attention.qv",)), ("two", ("mlp",))):
        (tmp_path / name).mkdir()
        method = LoRA(rank=2, alpha=4, targets=targets)
        runs.append(train(tiny_runs.config(tmp_path / name, base, lora=method, max_steps=3)).folder)
    (step,) = (runs[0] / "checkpoints").iterdir()
    for name in ("adapter", "best"):
        shutil.rmtree(runs[0] / name, ignore_errors=True)
    shutil.copytree(runs[1] / "adapter", runs[0] / "adapter")
    with pytest.raises(AdapterFileError, match="lora_A"):
        adapter_diff(step, runs[1] / "adapter")


def test_alpha_is_that_of_the_loralib_file(tmp_path):
    folder = tmp_path / "folder"
    model = tiny_models.build("llama")
    handle = lorakit.attach(model, lorakit.LoRA(rank=2, alpha=16), name="a")
    randomise(handle)
    handle.save(folder)
    formats.write_loralib(handle.stored(), tmp_path / "a.safetensors")
    for both in ((folder, tmp_path / "a.safetensors"), (tmp_path / "a.safetensors", folder)):
        found = adapter_diff(*both, alpha=4).overall
        assert max(found.first, found.second) == pytest.approx(4 * min(found.first, found.second))
        with pytest.raises(ConfigurationError, match="does not record alpha"):
            adapter_diff(*both)
    with pytest.raises(ConfigurationError, match="alpha is 4, but"):
        adapter_diff(folder, folder, alpha=4)


def test_bases_that_are_known_to_differ():
    def adapter(seed: int, name: str, **settings):
        model = tiny_models.build("llama", seed=seed)
        model.config._name_or_path = name
        return lorakit.attach(model, lorakit.LoRA(rank=2, **settings), name="a").stored()

    one, other = adapter(0, "org/base"), adapter(1, "org/chat")
    assert adapter_diff(one, adapter(0, "/models/base")).notices == []
    (notice,) = adapter_diff(one, other).notices
    assert "different bases" in notice
    assert "'org/base' (LlamaForCausalLM), 'org/chat' (LlamaForCausalLM)" in notice
    # PEFT records the name alone, and a trained module is no part of the record.
    peft = {"base": None, "provenance": {"peft": {"base_model_name_or_path": "copies/Chat"}}}
    unrecorded = dataclasses.replace(other, **peft)
    assert adapter_diff(unrecorded, other).notices == []
    assert adapter_diff(one, unrecorded).notices == [
        "The adapters name different bases: 'org/base', 'copies/Chat'."
    ]
    trained = adapter(1, "org/chat", train_modules="norm")
    assert "different bases" in adapter_diff(one, trained).notices[0]
    assert "different" not in "".join(adapter_diff(other, trained).notices)


def test_shapes_that_differ():
    with pytest.raises(ConfigurationError, match="equal shapes were expected"):
        difference((*factors(2, 5, 6, seed=0), 1.0), (*factors(2, 5, 7, seed=0), 1.0))
    with pytest.raises(AdapterFileError, match="different base models"):
        adapter_diff(stored("linear"), stored(linear=linear(A=randn(4, 9, seed=0))))
