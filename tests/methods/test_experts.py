"""LoRA on the stacked experts of a mixture, against the experts computed one by one in float64."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from random_adapters import randomise
from torch import Tensor, nn
from transformers import PreTrainedModel

import lorakit
from lorakit import LoRA
from lorakit.adapters.handle import handle_of
from lorakit.adapters.layer_adapters import LayerAdapters
from lorakit.errors import AdapterStateError, ConfigurationError, LorakitError
from lorakit.methods.lora.experts import ExpertsLoRA
from lorakit.ops.low_rank_sum import LowRankSum

ARCHITECTURES = tiny_models.WITH_EXPERTS
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


def mixture(arch: str = "Qwen3Moe", implementation: str = "eager", **options: Any) -> Any:
    """Return a tiny model in float64, for which grouped products have no kernel, or in float32."""
    model = tiny_models.build(arch, **options).eval()
    model.config._experts_implementation = implementation
    return model if implementation == "grouped_mm" else model.double()


def batch(arch: str, model: nn.Module) -> dict[str, Tensor]:
    """Return a batch without padding: some float64 softmaxes return NaN for fully masked rows."""
    found = tiny_models.example_batch(arch, model)
    found["input_ids"][found["input_ids"] == tiny_models.PAD] = 5
    return {"input_ids": found["input_ids"]}


def adapted(model: nn.Module, name: str = "a", seed: int = 0, **options: Any) -> lorakit.Adapters:
    """Attach a random adapter to the experts."""
    settings = {"rank": 2, "alpha": 3, "targets": "experts", **options}
    handle = lorakit.attach(model, LoRA(**settings), name=name, dtype=torch.float64, seed=seed)
    randomise(handle, name, seed=seed)
    return handle


@torch.no_grad()
def merged_by_hand(model: PreTrainedModel, handle: lorakit.Adapters, scaling: float) -> nn.Module:
    """Return a copy of the base with ``W[e] + scaling * B[e] A[e]`` for each expert e, written out in a loop."""
    merged = copy.deepcopy(model)
    handle_of(merged).detach()
    factors = {n: p for n, p in model.named_parameters() if ".lora_" in n}
    for name, A in factors.items():
        if not name.endswith("lora_A"):
            continue
        B = factors[name.replace("lora_A", "lora_B")]
        path, _, weight = name.removesuffix(".lora_A").replace(".adapters.a", "").rpartition(".")
        experts = merged.get_submodule(path)
        W = getattr(experts, weight)
        r, rows = B.shape[1], len(B) // len(W)
        for e in range(len(W)):
            change = scaling * B[e * rows : (e + 1) * rows] @ A[e * r : (e + 1) * r]
            W[e] += change.T if getattr(experts, "is_transposed", False) else change
    return merged


def hooks_of(model: nn.Module) -> list[Any]:
    experts = [m for m in model.modules() if type(m).__name__.endswith("Experts")]
    return [h for m in experts for h in (*m._forward_hooks, *m._forward_pre_hooks)]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_each_expert_has_factors_of_its_own(arch):
    model = mixture(arch)
    inputs = batch(arch, model)
    base = model(**inputs)[0]
    handle = adapted(model)
    output = model(**inputs)[0]
    assert (output - base).abs().max() > 1e-2
    expected = merged_by_hand(model, handle, 1.5)(**inputs)[0]
    # transformers computes some norms and softmaxes in float32.
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    with handle.disabled():
        torch.testing.assert_close(model(**inputs)[0], base, rtol=0, atol=0)
    handle.merge()
    torch.testing.assert_close(model(**inputs)[0], expected, rtol=0, atol=1e-5)
    handle.unmerge()
    torch.testing.assert_close(model(**inputs)[0], output, rtol=0, atol=0)


@pytest.mark.parametrize("arch", ["Qwen3Moe", "GptOss"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_without_the_sum(arch, implementation, monkeypatch):
    """Every implementation of transformers multiplies by W, B and A; none computes W + dW."""
    model = mixture(arch, implementation)
    handle = adapted(model)
    inputs, parameters = batch(arch, model), list(handle.trainable_parameters())

    def gradients() -> list[Tensor]:
        loss = model(**inputs)[0].double().square().sum()
        return [loss, *torch.autograd.grad(loss, parameters)]

    with monkeypatch.context() as patch:
        patch.setattr(ExpertsLoRA, "shadow_factors", lambda module, attribute: None)
        expected = gradients()
    monkeypatch.setattr(LowRankSum, "dense", lambda total: pytest.fail("it was computed"))
    tolerance = 2e-4 if implementation == "grouped_mm" else 1e-6
    for ours, theirs in zip(gradients(), expected, strict=True):
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize(
    "options",
    [
        {"dora": True},
        {"init": "pissa"},
        {"scaling": "rslora"},
        {"targets": ["attention.qv", "experts.down_proj"], "rank_pattern": {"down_proj": 1}},
    ],
    ids=str,
)
def test_options(options, tmp_path):
    model = mixture()
    inputs = batch("Qwen3Moe", model)
    base = model(**inputs)[0]
    fresh = lorakit.attach(model, LoRA(**{"rank": 2, "targets": "experts", **options}), seed=0)
    torch.testing.assert_close(model(**inputs)[0], base, rtol=0, atol=1e-5)
    fresh.detach()
    handle = adapted(model, **options)
    output = model(**inputs)[0]
    assert (output - base).abs().max() > 1e-2
    handle.save(tmp_path / "adapter")
    handle.merge()
    torch.testing.assert_close(model(**inputs)[0], output, rtol=0, atol=1e-5)
    again = mixture()
    lorakit.load(again, tmp_path / "adapter")
    torch.testing.assert_close(again(**inputs)[0], output, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 0.1}, "dropout"),
        ({"lora_bias": True}, "lora_bias"),
        ({"rank": 17}, r"Rank 17 exceeds the width .*experts.*rank of at most 16"),
    ],
    ids=str,
)
def test_refused_options(options, message):
    with pytest.raises(ConfigurationError, match=message):
        lorakit.attach(mixture(), LoRA(**{"targets": "experts", **options}))


def test_a_blend_of_adapters_with_different_weights():
    model = mixture()
    inputs = batch("Qwen3Moe", model)
    handle = adapted(model, "a")
    adapted(model, "b", seed=1, targets="experts.down_proj", rank=1)
    handle.activate({"a": 0.5, "b": -2.0})
    output = model(**inputs)[0]
    handle.merge()
    torch.testing.assert_close(model(**inputs)[0], output, rtol=0, atol=1e-6)


@pytest.mark.parametrize("arch", ["mixtral", "Qwen2Moe", "GptOss"])
def test_rows_and_tokens_with_adapters_of_their_own(arch):
    """Also shared experts, which get all tokens in one axis, and DoRA."""
    model = mixture(arch)
    adapted(model, "a")
    adapted(model, "b", seed=1, targets="all-linear")
    handle = adapted(model, "c", seed=2, dora=True)
    ids = torch.arange(5, 29).view(4, 6)
    rows = ["c", None, "a", "b"]
    alone = []
    for i, name in enumerate(rows):
        handle.activate(name)
        alone.append(model(input_ids=ids[i : i + 1])[0])
    expected = torch.cat(alone)
    parameters = list(handle.trainable_parameters("a"))
    gradients = torch.autograd.grad(expected.square().sum(), parameters)
    blocks = (handle.per_sample(rows), handle.per_token([(name, 6) for name in rows]))
    for block in blocks:
        with block:
            output = model(input_ids=ids)[0]
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)
        found = torch.autograd.grad(output.square().sum(), parameters)
        torch.testing.assert_close(found, gradients, rtol=1e-5, atol=1e-6)
    with handle.per_sample(["a"] * 4):
        whole = model(input_ids=ids)[0]
    torch.testing.assert_close(whole[2], expected[2], rtol=0, atol=1e-6)


def test_experts_without_the_routes_of_their_tokens_refuse_rows():
    """Those of Llama 4 get each token once for every expert."""
    model = mixture()
    handle = adapted(model)
    for module in model.modules():
        if type(module).__name__ == "Qwen3MoeExperts":
            del module.is_transposed
    handle.detach()
    handle = adapted(model)
    with (
        handle.per_sample(["a", None]),
        pytest.raises(
            AdapterStateError, match=r"experts' cannot use different adapters .* experts of each"
        ),
    ):
        model(input_ids=torch.arange(5, 17).view(2, 6))


def test_a_choice_beside_a_trained_copy_of_the_experts():
    model = mixture()
    inputs = batch("Qwen3Moe", model)
    handle = adapted(model, "a")
    expected = model(**inputs)[0]
    adapted(model, "b", seed=1, targets="attention.q", train_modules="mlp.experts")
    handle.activate("b")
    with handle.using("a"):
        torch.testing.assert_close(model(**inputs)[0], expected, rtol=0, atol=0)
    handle.activate(None)
    with (
        handle.per_sample(["a", *["b"] * (len(expected) - 1)]),
        pytest.raises(AdapterStateError, match=r"each row of a Qwen3MoeExperts"),
    ):
        model(**inputs)


class DenseExperts(nn.Module):
    """Experts that all get every token, and a weight with the name of an attribute of lorakit's module."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(3, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("eoi,bti->bto", self.weights, x)


def test_experts_of_a_class_of_the_users():
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("moe", DenseExperts())
    x = torch.randn(2, 5, 4)
    base = model(x)
    handle = lorakit.attach(model, LoRA(rank=2, targets="experts"))
    randomise(handle)
    output = model(x)
    assert (output - base).abs().max() > 1e-2
    with (
        handle.per_sample(["default", None]),
        pytest.raises(AdapterStateError, match="'moe' cannot"),
    ):
        model(x)
    handle.merge()
    torch.testing.assert_close(model(x), output, rtol=0, atol=1e-5)
    handle.unmerge()
    handle.detach()
    with pytest.raises(ConfigurationError, match=r"dora .* on DenseExperts"):
        lorakit.attach(model, LoRA(rank=2, targets="experts", dora=True))


@pytest.mark.parametrize("other", [lorakit.FullFineTuning(), "trained module"], ids=str)
def test_experts_that_are_adapted_and_trained_in_full(other):
    method = LoRA(targets="experts", rank=2, train_modules="mlp.experts")
    if other != "trained module":
        method = lorakit.Combined(methods=(LoRA(targets="experts", rank=2), other))
    with pytest.raises(LorakitError, match=r"in full.*(Remove it|Choose one of the two)"):
        lorakit.attach(mixture(), method)


def test_copies_files_and_detaching(tmp_path: Path):
    model = mixture()
    inputs = batch("Qwen3Moe", model)
    base, keys = model(**inputs)[0], model.state_dict().keys()
    hooks = len(hooks_of(model))
    handle = adapted(model, targets="all-linear")
    output = model(**inputs)[0]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(**inputs)[0], output, rtol=0, atol=0)
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    model.train()
    output.detach()
    model(**inputs)[0].sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in handle.trainable_parameters())
    model.eval()
    model.save_pretrained(tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged", dtype=torch.float64).eval()
    merged.config._experts_implementation = "eager"
    torch.testing.assert_close(merged(**inputs)[0], output, rtol=0, atol=1e-5)
    handle.detach()
    torch.testing.assert_close(model(**inputs)[0], base, rtol=0, atol=0)
    assert model.state_dict().keys() == keys
    assert not any(isinstance(module, LayerAdapters) for module in model.modules())
    assert len(hooks_of(model)) == hooks
