"""Sums equal the sums of the changes exactly; a single adapter with weight 1 stays unchanged."""

from __future__ import annotations

import dataclasses

import pytest
import tiny_models
import torch
from at_rest import delta, same_bits
from random_adapters import randomise
from sample_adapters import dense_parts, layers, linear, randn, stored, trained_llama

import lorakit
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.adapters.formats.stored_layer import StoredLayer
from lorakit.adapters.loading import load
from lorakit.analysis import combine_adapters, dare, ties
from lorakit.errors import AdapterFileError, ConfigurationError, WrongBaseError
from lorakit.models.layers import RowSlice

OPTIONS = {
    "plain": {},
    "rslora": {"scaling": "rslora"},
    "dora": {"dora": True},
    "pissa": {"init": "pissa"},
    "biases": {"bias": "all"},
    "patterns": {"rank_pattern": {"c_proj": 3}, "alpha_pattern": {"c_fc": 5.0}},
    "head": {"train_modules": "ln_f"},
    "embedding": {"targets": ("embedding", "attention.qv")},
    "tied head": {"targets": ("embedding", "attention.qv"), "tie_head": True},
    "slices": {"targets": ("attention.q", "attention.v", "mlp")},
    "dropout": {"dropout": 0.5},
}


def adapted_gpt2(**settings) -> lorakit.Adapters:
    """Adapt a GPT-2, which has fused projections, transposed weights, biases and a tied head."""
    model = tiny_models.build("gpt2")
    method = lorakit.LoRA(**{"rank": 2, "alpha": 3.0, "targets": "all-linear"} | settings)
    handle = lorakit.attach(model, method, name="a")
    randomise(handle)
    return handle


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("how", ["sum", "ties", "dare"])
def test_one_adapter_with_weight_1_is_itself(option, how, tmp_path):
    handle = adapted_gpt2(**OPTIONS[option])
    original = handle.stored()
    made = combine_adapters([original], [1.0], how=how, density=None if how == "sum" else 1)
    assert made.error == 0
    assert made.adapter.method == original.method
    for path, layer in original.layers.items():
        for field, tensor in layer.tensors.items():
            same_bits(made.adapter.layers[path].tensors[field], tensor, f"{path}.{field}")
        assert made.adapter.layers[path].scaling == layer.scaling
    for name, tensor in original.trained.items():
        same_bits(made.adapter.trained[name], tensor, name)

    model = tiny_models.build("gpt2")
    load(model, made.adapter, name="same")
    batch = tiny_models.example_batch("gpt2", model)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, handle.model(**batch).logits)


@pytest.mark.parametrize("name", [n for n in layers() if n != "dora"])
def test_the_sum_of_two_is_the_sum_of_their_changes(name):
    first = stored(name)
    second = stored(**{name: _other(layers()[name])})
    made = combine_adapters([first, second], [0.7, -1.3])
    expected = 0.7 * delta(first.layers[name]) - 1.3 * delta(second.layers[name])
    # Each number of B is rounded to float32 once.
    found = delta(made.adapter.layers[name])
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-7 * float(expected.norm()))
    assert made.error == 0
    ranks = [
        2 * layer.rank if layer.initial_A is not None else layer.rank
        for layer in (first.layers[name], second.layers[name])
    ]
    assert made.adapter.layers[name].rank == sum(ranks)


def _other(layer: StoredLayer) -> StoredLayer:
    """Return a similar layer with other numbers, another scaling and, if possible, another rank."""
    noisy = {
        name: tensor + randn(*tensor.shape, seed=77)
        for name, tensor in layer.tensors.items()
        if name in ("A", "B")
    }
    if layer.kind == "linear" and not layer.slices and layer.initial_A is None:
        noisy = {"A": noisy["A"][:3], "B": noisy["B"][:, :3]}
    return dataclasses.replace(layer, **noisy, scaling=0.3 * layer.scaling, alpha=0.3 * layer.alpha)


def test_equal_scalings_leave_every_bit_of_the_factors():
    one, other = stored("linear"), stored(linear=linear(50))
    found = combine_adapters([one, other]).adapter.layers["linear"]
    same_bits(found.A, torch.cat([one.layers["linear"].A, other.layers["linear"].A]))
    same_bits(found.B, torch.cat([one.layers["linear"].B, other.layers["linear"].B], dim=1))
    assert found.scaling == 2.0


def test_a_layer_of_one_adapter_alone_is_only_scaled():
    made = combine_adapters([stored("linear", "pissa"), stored("fused")], [0.5, 2.0])
    assert list(made.adapter.layers) == ["linear", "pissa", "fused"]
    assert made.adapter.method.targets == ("linear", "pissa", "fused")
    for name, factor in (("linear", 0.5), ("pissa", 0.5), ("fused", 2.0)):
        layer, found = layers()[name], made.adapter.layers[name]
        same_bits(found.A, layer.A)
        assert found.scaling == factor * layer.scaling


def test_different_slices_of_one_layer():
    fused = layers()["fused"]
    middle = RowSlice(groups=1, stride=60, offset=20, width=20)
    other = linear(70, slices=(middle,))
    whole = linear(71, B=randn(60, 4, seed=71))
    for second in (other, whole):
        made = combine_adapters([stored("fused"), stored(fused=second)], [2.0, 1.0])
        expected = 2 * delta(fused)
        expected = expected + (delta(second))
        found = made.adapter.layers["fused"]
        assert found.slices == ()
        torch.testing.assert_close(delta(found), expected, rtol=1e-6, atol=1e-5)


def test_a_sum_acts_as_the_weighted_adapters_do_together(tmp_path):
    handle = adapted_gpt2()
    lorakit.attach(handle.model, lorakit.LoRA(rank=3, targets=("attention.qv", "mlp")), name="b")
    randomise(handle, "b", seed=1)
    adapters = [handle.stored("a"), handle.stored("b")]
    made = combine_adapters(adapters, [0.6, -0.4])
    handle.activate({"a": 0.6, "b": -0.4})
    batch = tiny_models.example_batch("gpt2", handle.model)
    model = tiny_models.build("gpt2")
    load(model, made.adapter, name="sum")
    with torch.no_grad():
        expected = handle.model(**batch).logits
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-4)


def test_trained_adapters_compressed_after_the_sum():
    first, second = trained_llama().stored(), trained_llama(1).stored()
    made = combine_adapters([first, second], rank=3)
    for path, layer in made.adapter.layers.items():
        change = delta(first.layers[path]) + delta(second.layers[path])
        U, S, Vh = torch.linalg.svd(change, full_matrices=False)
        torch.testing.assert_close(delta(layer), U[:, :3] * S[:3] @ Vh[:3], rtol=0, atol=1e-5)
        assert made.layers[path].residual == pytest.approx(float(S[3:].norm()), rel=1e-4)


def test_ties_by_its_definition():
    changes = [torch.tensor([[3.0, -1.0, 0.5, 2.0]]), torch.tensor([[-1.0, -2.0, 0.1, -4.0]])]
    # Trimmed to half: (3, 0, 0, 2) and (0, -2, 0, -4). Elected signs: +, -, none, -.
    expected = torch.tensor([[3.0, -2.0, 0.0, -4.0]])
    torch.testing.assert_close(ties(changes, [1.0, 1.0], 0.5), expected)
    # Untrimmed: sums 2, -3, 0.6, -2; the mean covers the entries with the elected sign.
    torch.testing.assert_close(
        ties(changes, [1.0, 1.0], 1.0), torch.tensor([[3.0, -1.5, 0.3, -4.0]])
    )


@pytest.mark.parametrize("density", [0.0, 2.0])
def test_a_density_is_a_share(density: float) -> None:
    changes = [torch.ones(2, 2)]
    with pytest.raises(ConfigurationError, match=r"density is .*; it is a share of entries"):
        ties(changes, [1.0], density)
    with pytest.raises(ConfigurationError, match=r"density is .*; it is a share of entries"):
        dare(changes[0], density, torch.Generator())


@pytest.mark.slow
def test_ties_and_dare_beside_peft():
    merge_utils = pytest.importorskip("peft.utils.merge_utils")
    changes = [randn(12, 9, seed=i) for i in range(3)]
    for weights in ([1.0] * 3, [0.4] * 3):  # PEFT elects the signs before it weighs the changes
        expected = merge_utils.ties(changes, torch.tensor(weights), 0.4)
        torch.testing.assert_close(ties(changes, weights, 0.4), expected)
    kept = dare(changes[0], 0.5, torch.Generator().manual_seed(0))
    chosen = kept != 0
    torch.testing.assert_close(kept[chosen], 2 * changes[0][chosen])
    assert 0.3 < chosen.float().mean() < 0.7


@pytest.mark.parametrize("how", ["ties", "dare"])
@pytest.mark.parametrize("name", ["linear", "fused", "grouped", "embedding"])
def test_entrywise_results_are_approximated_at_the_sum_of_the_ranks(how, name):
    first, second = stored(name), stored(**{name: _other(layers()[name])})
    weights = [0.7, -1.3]
    made = combine_adapters([first, second], weights, how=how, density=0.6, seed=3)
    generator = torch.Generator().manual_seed(3)
    pieces = [dense_parts(adapter.layers[name]) for adapter in (first, second)]
    residual, norm = 0.0, 0.0
    for number, changes in enumerate(zip(*pieces, strict=True)):
        if name == "grouped":  # only the group's channels
            changes = [c[:, 9 * number : 9 * (number + 1)] for c in changes]
        changes = [change.float() for change in changes]
        if how == "ties":
            mixed = ties(changes, weights, 0.6)
        else:
            mixed = sum(
                weight * dare(change, 0.6, generator)
                for weight, change in zip(weights, changes, strict=True)
            )
        rank = sum(a.layers[name].rank // a.layers[name].groups for a in (first, second))
        U, S, Vh = torch.linalg.svd(mixed.double(), full_matrices=False)
        found = dense_parts(made.adapter.layers[name])[number]
        if name == "grouped":
            found = found[:, 9 * number : 9 * (number + 1)]
        torch.testing.assert_close(found, U[:, :rank] * S[:rank] @ Vh[:rank], rtol=0, atol=1e-4)
        residual += float(S[rank:].square().sum())
        norm += float(S.square().sum())
    assert made.error == pytest.approx((residual / norm) ** 0.5, rel=1e-3, abs=1e-4)


def _adapter(**settings) -> StoredAdapter:
    return adapted_gpt2(**settings).stored()


@pytest.mark.parametrize(
    ("option", "message"),
    [("dora", "DoRA magnitudes"), ("biases", "trained in full"), ("head", "trained in full")],
)
def test_what_is_not_linear_in_a_weight(option, message):
    adapter = _adapter(**OPTIONS[option])
    with pytest.raises(ConfigurationError, match=message):
        combine_adapters([adapter], [0.5])
    with pytest.raises(ConfigurationError, match="only be used alone, with weight 1"):
        combine_adapters([_adapter(), adapter])


def test_adapters_that_do_not_belong_together():
    with pytest.raises(ConfigurationError, match="tie_head"):
        combine_adapters([_adapter(**OPTIONS["tied head"]), _adapter(**OPTIONS["embedding"])])
    with pytest.raises(ConfigurationError, match="tie_head"):
        combine_adapters([_adapter(targets="head"), _adapter(**OPTIONS["tied head"])])
    other = tiny_models.build("gpt2", seed=5)
    foreign = lorakit.attach(other, lorakit.LoRA(rank=2, targets="all-linear"), name="b").stored()
    with pytest.raises(WrongBaseError, match="different bases"):
        combine_adapters([_adapter(), foreign])
    (notice,) = combine_adapters([_adapter(), foreign], allow_other_base=True).notices
    assert "allow_other_base" in notice
    with pytest.raises(AdapterFileError, match="not the same kind of layer"):
        combine_adapters([stored("linear"), stored(linear=linear(A=randn(4, 9, seed=0)))])
    with pytest.raises(AdapterFileError, match="not the same kind of layer"):
        combine_adapters([stored("linear"), stored(linear=layers()["embedding"])])


@pytest.mark.parametrize("first", ["tied head", "plain"])
def test_a_tied_head_beside_an_adapter_without_the_embedding(first):
    one, other = (adapted_gpt2(**OPTIONS[name]) for name in ("tied head", "plain"))
    stored_ones = [one.stored(), other.stored()]
    made = combine_adapters(stored_ones if first == "tied head" else stored_ones[::-1])
    summed, both = (tiny_models.build("gpt2") for _ in range(2))
    load(summed, made.adapter, name="sum")
    load(both, stored_ones[0], name="one")
    handle = load(both, stored_ones[1], name="other")
    handle.activate({"one": 1.0, "other": 1.0})
    batch = tiny_models.example_batch("gpt2", summed)
    with torch.no_grad():
        expected = both(**batch).logits
        torch.testing.assert_close(summed(**batch).logits, expected, rtol=1e-4, atol=1e-4)


def test_the_base_that_all_folders_of_peft_name():
    one = dataclasses.replace(_adapter(), base=None)
    settings = {"base_model_name_or_path": "org/base", "task_type": "CAUSAL_LM"}
    both = [
        dataclasses.replace(one, provenance={"peft": {**settings, "peft_version": version}})
        for version in ("0.18.0", "0.19.1")
    ]
    made = combine_adapters(both).adapter
    assert made.base_name == "org/base"
    # Without a version, a reader would warn of PEFT before 0.18.
    assert made.provenance["peft"] == {**settings, "peft_version": "0.18.0"}
    both[1].provenance = {}
    assert "peft" not in combine_adapters(both).adapter.provenance


def test_an_unknown_base_is_said():
    known = _adapter()
    unknown = dataclasses.replace(known, base=None)
    made = combine_adapters([unknown, known])
    assert "was not checked" in made.notices[0]
    assert made.adapter.base == known.base
    assert len(made.notices) == 1
    first, second = (
        dataclasses.replace(unknown, provenance={"peft": {"base_model_name_or_path": name}})
        for name in ("org/base", "org/chat")
    )
    named = combine_adapters([first, second]).notices[1]
    assert named == "The adapters name different bases: 'org/base', 'org/chat'."


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": [1.0]}, "2 adapters and 1 weights"),
        ({"weights": [1.0, 0.0]}, "other than 0"),
        ({"weights": [1.0, float("nan")]}, "finite"),
        ({"weights": [1.0, True]}, "finite"),
        ({"how": "tees"}, "Did you mean 'ties'"),
        ({"density": 0.5}, "keeps every entry"),
        ({"how": "ties"}, r"how is ties, which needs density, .* to 0\.2"),
        ({"how": "dare"}, r"how is dare, which needs density"),
        ({"how": "ties", "density": 0.0}, "above 0"),
        ({"rank": 2, "energy": 0.5}, "both"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        combine_adapters([stored("linear"), stored("linear")], **settings)


def test_nothing_to_combine():
    with pytest.raises(ConfigurationError, match="at least one"):
        combine_adapters([])


def test_one_path_is_no_list():
    with pytest.raises(ConfigurationError, match=r"adapters is 'out/a'; a list of paths was exp"):
        combine_adapters("out/a")
