"""Activate one adapter, none, a weighted sum, or one per row; merging computes the same."""

from __future__ import annotations

import covering_array
import pytest
import torch
from arithmetic import TIGHT, float64_model, inputs
from covering_array import Case
from layouts import LAYOUTS
from logits import assert_differ, assert_same, randomise
from torch import nn

from lorakit import Adapters, LoRA, attach
from lorakit.errors import AdapterStateError

every_case = pytest.mark.parametrize("case", covering_array.few_cases(), ids=str)
every_architecture = pytest.mark.parametrize("arch", LAYOUTS)


def attach_float64(model: nn.Module, method: LoRA, name: str = "default") -> Adapters:
    return attach(model, method, name=name, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@every_case
def test_a_merged_model_computes_the_same(case: Case):
    model = float64_model(case.arch, case.head)
    batch = inputs(case.arch, model)
    base = model(**batch).logits
    handle = attach_float64(model, case.method())
    randomise(handle.trainable_parameters("default"), seed=1)
    adapted = model(**batch).logits
    assert_differ(adapted, base)

    handle.merge()
    merged = model(**batch).logits
    assert_same(merged, adapted, TIGHT)
    handle.unmerge()
    assert torch.equal(model(**batch).logits, adapted)
    handle.activate(None)
    assert torch.equal(model(**batch).logits, base)


@every_architecture
def test_merge_without_keeping_the_base(arch: str):
    """merge(keep_base=False) returns a plain model with the same class, keys and output."""
    model = float64_model(arch)
    batch = inputs(arch, model)
    base, keys = model(**batch).logits, list(model.state_dict())
    handle = attach_float64(model, LoRA(rank=2, alpha=3.0, targets=("attention", "embedding")))
    randomise(handle.trainable_parameters("default"), seed=1)
    adapted = model(**batch).logits
    assert_differ(adapted, base)
    handle.merge(keep_base=False)
    assert_same(model(**batch).logits, adapted, TIGHT)
    assert list(model.state_dict()) == keys
    assert handle.names == ()


# --- two adapters --------------------------------------------------------------------------------


def with_two(arch: str, **settings) -> tuple[nn.Module, dict[str, torch.Tensor], Adapters]:
    """Return a model with adapter `a` on q and v and adapter `b` on all linear layers."""
    model = float64_model(arch)
    wide = "attention" if arch == "mixtral" else "all-linear"
    handle = attach_float64(model, LoRA(rank=2, alpha=3.0, targets="attention.qv"), name="a")
    attach_float64(model, LoRA(rank=3, alpha=5.0, targets=wide, **settings), name="b")
    randomise(handle.trainable_parameters("a"), seed=1)
    randomise(handle.trainable_parameters("b"), seed=2)
    return model, inputs(arch, model), handle


def merged_weights(model: nn.Module, handle: Adapters, choice) -> dict[str, torch.Tensor]:
    handle.merge(choice)
    weights = {n: p.clone() for n, p in model.named_parameters() if ".adapters." not in n}
    handle.unmerge()
    return weights


@every_architecture
def test_an_inactive_adapter_has_no_effect(arch: str):
    """An adapter computes the same with and without another adapter on the same layers."""
    model, batch, handle = with_two(arch)
    logits = {}
    for name in ("a", "b"):
        handle.activate(name)
        assert handle.active == {name: 1.0}
        logits[name] = model(**batch).logits
    assert_differ(logits["a"], logits["b"])
    handle.remove("b")
    handle.activate("a")
    assert torch.equal(model(**batch).logits, logits["a"])


@every_architecture
def test_weighted_activation_adds_the_scaled_deltas(arch: str):
    """{a: 0.7, b: -0.3} computes W + 0.7 dW_a - 0.3 dW_b, where each delta comes from a merge."""
    model, batch, handle = with_two(arch)
    handle.activate(None)
    base_weights = {n: p.clone() for n, p in model.named_parameters() if ".adapters." not in n}
    base = model(**batch).logits
    a, b = (merged_weights(model, handle, name) for name in ("a", "b"))
    choice = {"a": 0.7, "b": -0.3}

    handle.activate(choice)
    mixed = model(**batch).logits
    assert handle.active == choice
    assert_differ(mixed, base)

    oracle = float64_model(arch)
    for name, parameter in oracle.named_parameters():
        W = base_weights[name]
        parameter.copy_(W + 0.7 * (a[name] - W) - 0.3 * (b[name] - W))
    assert_same(oracle(**batch).logits, mixed, TIGHT)
    handle.merge()
    assert_same(model(**batch).logits, mixed, TIGHT)
    handle.unmerge()
    assert torch.equal(model(**batch).logits, mixed)

    handle.activate({"a": 1.0})
    alone = model(**batch).logits
    handle.activate("a")
    assert torch.equal(model(**batch).logits, alone)
    handle.activate({"a": 1.0, "b": 0.0})
    assert_same(model(**batch).logits, alone, TIGHT)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [arch for arch in LAYOUTS if arch != "deberta-v2"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_per_sample_equals_the_separate_runs(arch: str, dora: bool):
    model, batch, handle = with_two(arch, dora=dora)
    rows = ["a", None, "b", "b", "a"]
    picks = torch.tensor([0, 1, 0, 1, 1])
    separate = {}
    for name in dict.fromkeys(rows):
        handle.activate(name)
        separate[name] = model(**batch).logits
    assert_differ(separate["a"], separate[None])
    assert_differ(separate["b"], separate[None])
    handle.activate("a")
    with handle.per_sample(rows):
        together = model(**{key: value[picks] for key, value in batch.items()}).logits
    for row, (name, pick) in enumerate(zip(rows, picks, strict=True)):
        assert_same(together[row], separate[name][pick], TIGHT)
    assert torch.equal(model(**batch).logits, separate["a"])


def test_per_sample_rejects_layers_without_batch_rows():
    """DeBERTa projects its relative positions once for all rows: an error instead of wrong results."""
    model, batch, handle = with_two("deberta-v2")
    with (
        handle.per_sample(["a", "b"]),
        pytest.raises(AdapterStateError, match=r"query_proj.*table of positions"),
    ):
        model(**batch)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert", "vit"])
def test_per_sample_in_the_embedding_and_the_head(arch: str):
    """These layers take token ids, an image or single positions instead of a batch of vectors."""
    model = float64_model(arch)
    batch = inputs(arch, model)
    handle = attach_float64(model, LoRA(rank=2, alpha=3.0, targets="embedding"), name="a")
    attach_float64(model, LoRA(rank=2, alpha=3.0, targets=("embedding", "head")), name="b")
    for seed, name in enumerate(handle.names):
        randomise(handle.trainable_parameters(name), seed=seed)
    separate = []
    for row, name in enumerate(("a", "b")):
        handle.activate(name)
        separate.append(model(**batch).logits[row])
    with handle.per_sample(["a", "b"]):
        together = model(**batch).logits
    for row, alone in enumerate(separate):
        assert_same(together[row], alone, TIGHT)
    handle.activate(None)
    assert_differ(together, model(**batch).logits)


def test_per_sample_with_trained_modules_and_biases():
    """Rows of an adapter that trains base parameters use its copies, the other rows use the base's."""
    model = float64_model("roberta", "sequence-classification")
    batch = inputs("roberta", model)
    handle = attach_float64(model, LoRA(rank=2, alpha=3.0, bias="lora_only"), name="a")
    attach_float64(model, LoRA(rank=2, alpha=3.0, train_modules="classifier"), name="b")
    for seed, name in enumerate(handle.names):
        randomise(handle.trainable_parameters(name), seed=seed)
    rows = ("a", "b")
    separate = []
    for row, name in enumerate(rows):
        handle.activate(name)
        separate.append(model(**batch).logits[row])
    with handle.per_sample(rows):
        together = model(**batch).logits
    for row, alone in enumerate(separate):
        assert_same(together[row], alone, TIGHT)
    with handle.per_sample(["b", "a"]):
        assert_differ(model(**batch).logits, together)


# --- adapters without weights --------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"dora": True},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"train_modules": "classifier"},
    ],
    ids=lambda settings: "-".join(f"{name}={value}" for name, value in settings.items()),
)
@pytest.mark.parametrize("call", ["activate", "merge"])
def test_parts_that_are_not_linear_cannot_be_weighted(settings: dict, call: str):
    model = float64_model("bert", "sequence-classification")
    batch = inputs("bert", model)
    handle = attach_float64(model, LoRA(rank=2, alpha=3.0), name="plain")
    attach_float64(model, LoRA(rank=2, alpha=3.0, **settings), name="special")
    for seed, name in enumerate(handle.names):
        randomise(handle.trainable_parameters(name), seed=seed)
    logits = model(**batch).logits
    for choice in (
        {"special": 0.5},
        {"special": 1.0, "plain": 1.0},
        {"plain": 0.5, "special": 1.0},
    ):
        with pytest.raises(AdapterStateError, match=r"'special'.*not linear in a weight"):
            getattr(handle, call)(choice)
    assert handle.active == {"special": 1.0}
    assert torch.equal(model(**batch).logits, logits)
    handle.activate({"special": 1.0})
    assert torch.equal(model(**batch).logits, logits)


def test_operations_that_the_state_forbids():
    model, batch, handle = with_two("llama")
    handle.merge("a")
    merged = model(**batch).logits
    for forbidden in (
        lambda: handle.activate("b"),
        lambda: handle.merge("b"),
        lambda: handle.remove("a"),
        lambda: attach_float64(model, LoRA(rank=2), name="c"),
        lambda: handle.per_sample(["a", "b"]).__enter__(),
    ):
        with pytest.raises(AdapterStateError, match="is merged"):
            forbidden()
    assert torch.equal(model(**batch).logits, merged)
    handle.unmerge()
    with pytest.raises(AdapterStateError, match="nothing to unmerge"):
        handle.unmerge()
    with pytest.raises(AdapterStateError, match=r"No adapter is named 'c'.*a, b"):
        handle.activate("c")
    with pytest.raises(AdapterStateError, match="already has an adapter named"):
        attach_float64(model, LoRA(rank=2), name="a")
    with handle.per_sample(["a"] * 3), pytest.raises(AdapterStateError, match="names 3 rows"):
        model(**batch)
