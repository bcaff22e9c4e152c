"""Adapters on a quantised base: unmerged next to quantised weights, merged into dequantised ones."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny_models
import torch
from random_adapters import randomise
from tiny_models import logits, tensors_of
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

import lorakit
from lorakit.adapters import attach, count_parameters, load
from lorakit.errors import AdapterStateError, ConfigurationError, WrongBaseError
from lorakit.methods.full import FullFineTuning
from lorakit.methods.lora import LoRA
from lorakit.models.quantised import quantised_weights
from lorakit.models.quantising import quantise

KINDS = ("nf4", "int8")
WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
"""Two float32 computations of the same logits, through two layers."""


def base(arch: str = "llama", kind: str = "nf4", dtype=torch.float32, **settings) -> Any:
    model = tiny_models.build(arch, **settings).to(dtype)
    model.config._name_or_path = "tiny"
    quantise(model, kind)  # type: ignore[arg-type]
    return model


def expand(model: PreTrainedModel, arch: str = "llama", **settings: Any) -> Any:
    """The same model with dequantised weights."""
    whole = tiny_models.build(arch, **settings).to(model.dtype)
    with torch.no_grad():
        for path, weight in quantised_weights(model):
            whole.get_submodule(path).weight.copy_(weight.dequantised())
    return whole


def assert_same_state(model: nn.Module, before: dict[str, Tensor]) -> None:
    now = model.state_dict()
    assert now.keys() == before.keys()
    assert all(now[name].equal(tensor) for name, tensor in before.items())


METHODS = {
    "whole layers": LoRA(targets="all-linear"),
    "slices": LoRA(targets="attention.qv", rank=2),
    "dora": LoRA(targets="all-linear", dora=True),
    "pissa": LoRA(targets="all-linear", init="pissa"),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


# --- unmerged -------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_an_adapter_acts_as_on_the_expanded_base(arch: str, method: LoRA, kind: str) -> None:
    """Fused projections (gpt2, phi3), Conv1D (gpt2), norms and singular vectors of W_q."""
    model = base(arch, kind)
    whole, before = expand(model, arch), logits(model)
    adapters, twins = attach(model, method, seed=0), attach(whole, method, seed=0)
    torch.testing.assert_close(logits(model), before, **TOLERANCE)
    randomise(adapters)
    randomise(twins)
    if method.init == "pissa":  # singular vectors are determined up to their sign
        twins.modules()
        for path, module in adapters.modules().items():
            twins.modules()[path].load_state_dict(module.state_dict())
    expected = logits(whole)
    torch.testing.assert_close(logits(model), expected, **TOLERANCE)
    adapters.merge()
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)


def test_gradients_are_those_of_the_expanded_base(kind: str) -> None:
    model = base(kind=kind)
    whole = expand(model)
    gradients = []
    for each in (model, whole):
        adapters = attach(each, LoRA(targets="all-linear", dropout=0.0), seed=0)
        randomise(adapters)
        batch = tiny_models.example_batch("llama", each)
        each.train()(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append([p.grad for p in adapters.trainable_parameters()])
    for mine, twins in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, twins, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(kind: str, reentrant: bool) -> None:
    gradients = []
    for checkpointed in (False, True):
        model = base(kind=kind).train()
        adapters = attach(model, LoRA(targets="all-linear"), seed=0)
        randomise(adapters)
        if checkpointed:
            enable = getattr(
                model, "activation_checkpointing_enable", model.gradient_checkpointing_enable
            )
            enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        batch = tiny_models.example_batch("llama", model)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append([p.grad for p in adapters.trainable_parameters()])
    assert all(one.equal(other) for one, other in zip(*gradients, strict=True))


def test_parameters_are_counted_as_what_they_stand_for(kind: str) -> None:
    whole = tiny_models.build("llama")
    expected = attach(whole, LoRA(targets="all-linear")).summary().counts
    model = base(kind=kind)
    assert count_parameters(model, LoRA(targets="all-linear")) == expected
    adapters = attach(model, LoRA(targets="all-linear"))
    assert adapters.summary().counts == expected
    adapters.merge()
    assert adapters.summary().counts == expected
    assert str(lorakit.targets(model)) == str(lorakit.targets(whole))


def test_per_sample(kind: str) -> None:
    model = base(kind=kind)
    adapters = attach(model, LoRA(targets="all-linear"), name="a", seed=0)
    attach(model, LoRA(targets="attention.qv", rank=2), name="b", seed=1)
    randomise(adapters)
    batch = {"input_ids": torch.tensor([[3, 4, 5]] * 3)}
    expected = []
    for row, name in enumerate(("a", None, "b")):
        adapters.activate(name)
        expected.append(model(**batch).logits[row])
    with adapters.per_sample(["a", None, "b"]):
        torch.testing.assert_close(model(**batch).logits, torch.stack(expected), **TOLERANCE)


def test_a_bias_is_trained_in_full_precision(kind: str) -> None:
    model = base("qwen2", kind, torch.bfloat16).train()
    adapters = attach(model, LoRA(bias="lora_only"))
    for parameter in adapters.trainable_parameters():
        parameter.data = parameter.data.float()
    biases = [m.trained["bias"] for m in adapters.modules().values()]
    batch = tiny_models.example_batch("qwen2", model)
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(bias.dtype == torch.float32 for bias in biases)
    assert all(bias.grad is not None and bias.grad.shape == bias.shape for bias in biases)


@pytest.mark.parametrize(
    "method",
    [FullFineTuning(), FullFineTuning(top_layers=1), LoRA(train_modules="mlp")],
    ids=["full", "top layer", "train_modules"],
)
def test_quantised_weights_are_not_trained_in_full(method, kind: str) -> None:
    model = base(kind=kind)
    before = tensors_of(model)
    message = rf"weight' belongs to a quantised layer \({kind}\).*LoRA \(targets\), or load the base in bfloat16"
    with pytest.raises(ConfigurationError, match=message):
        count_parameters(model, method)
    with pytest.raises(ConfigurationError, match=message):
        attach(model, method)
    assert_same_state(model, before)
    attach(model, LoRA(train_modules="lm_head"))  # which is not quantised


# --- merged ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_adds_to_the_dequantised_weight_and_rounds_once(kind: str, dtype) -> None:
    model = base(kind=kind, dtype=dtype)
    before, unmerged = tensors_of(model), logits(model)
    adapters = attach(model, LoRA(targets="mlp.up", rank=4, alpha=8), name="a", seed=0)
    attach(model, LoRA(targets="mlp", rank=2, alpha=2), name="b", seed=1)
    randomise(adapters)
    layer, held = model.model.layers[0].mlp.up_proj, dict(quantised_weights(model))
    path, layer_class = "model.layers.0.mlp.up_proj", type(layer)
    a, b = (adapters.modules(name)[path] for name in ("a", "b"))
    expected = held[path].matrix() + 0.5 * 2 * (a.lora_B @ a.lora_A) - 3 * (b.lora_B @ b.lora_A)
    for _ in range(3):
        adapters.merge({"a": 0.5, "b": -3.0})
        assert type(layer) is nn.Linear
        torch.testing.assert_close(layer.weight, expected.to(dtype), rtol=2**-7, atol=1e-6)
        assert layer.weight.dtype == dtype
        adapters.unmerge()
        assert type(layer) is layer_class
    adapters.activate("a")
    adapters.merge()
    exact = (held[path].matrix() + a.delta_matrix()).to(dtype)
    assert layer.weight.equal(exact)
    adapters.detach()
    assert_same_state(model, before)
    assert logits(model).equal(unmerged)


@pytest.mark.parametrize("keep_base", [True, False])
def test_a_layer_whose_forward_is_wrapped_is_not_merged(kind: str, keep_base: bool) -> None:
    model = base(kind=kind)
    adapters = attach(model, LoRA())
    last = model.model.layers[1].self_attn.v_proj
    last.forward = last.forward  # as accelerate's hooks leave it
    before = tensors_of(model)
    with pytest.raises(
        AdapterStateError, match="is quantised, and the forward of its layer is wrapped"
    ):
        adapters.merge(keep_base=keep_base)
    assert_same_state(model, before)
    assert not adapters.merged
    assert adapters.active == {"default": 1.0}
    assert len(dict(quantised_weights(model))) == 14


# --- written --------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_model_is_an_ordinary_one(arch, kind, dtype, tmp_path, caplog) -> None:
    model = base(arch, kind, dtype)
    ordinary = tiny_models.build(arch)
    adapters = attach(model, LoRA(targets="attention.qv"), seed=0)
    randomise(adapters, scale=0.1)
    adapters.merge()
    merged = logits(model)
    adapters.unmerge()
    with caplog.at_level(logging.WARNING, "lorakit"):
        adapters.merge(keep_base=False)
    assert "The base was quantised: the merged model holds the dequantised weights" in caplog.text
    assert {n: type(m) for n, m in model.named_modules()} == {
        n: type(m) for n, m in ordinary.named_modules()
    }
    assert {n: p.shape for n, p in model.state_dict().items()} == {
        n: p.shape for n, p in ordinary.state_dict().items()
    }
    for name, module in model.named_modules():
        assert vars(module).keys() <= vars(ordinary.get_submodule(name)).keys(), name
    if dtype == torch.float32:
        torch.testing.assert_close(logits(model), merged, **TOLERANCE)
    model.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    assert_same_state(again, tensors_of(model))


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
def test_save_pretrained_writes_the_adapted_model_whole(arch, kind, merged, tmp_path) -> None:
    model = base(arch, kind)
    adapters = attach(model, LoRA(targets="attention.qv"))
    randomise(adapters)
    expected, held = logits(model), len(dict(quantised_weights(model)))
    if merged:
        adapters.merge()
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager")
    torch.testing.assert_close(logits(again), expected, rtol=1e-3, atol=1e-3)
    assert not dict(quantised_weights(again))
    if merged:
        adapters.unmerge()
    assert len(dict(quantised_weights(model))) == held
    assert model.config.quantization_config is not None


def test_what_was_written_loads_into_the_adapted_model(kind: str) -> None:
    """As a resumed `transformers.Trainer` does."""
    from lorakit.adapters.save_pretrained import adapted_state_dict

    model = base(kind=kind)
    adapters = attach(model, LoRA())
    randomise(adapters)
    expected, before = logits(model), tensors_of(model)
    written = adapted_state_dict(model, before)
    randomise(adapters, seed=1)
    assert not logits(model).equal(expected)
    result = model.load_state_dict(written, strict=False)
    assert not result.unexpected_keys
    assert_same_state(model, before)
    assert logits(model).equal(expected)
    written = adapted_state_dict(model, model.state_dict())
    key = "model.layers.0.mlp.up_proj.weight"
    written[key] = written[key] + 1
    with pytest.raises(
        AdapterStateError,
        match=rf"{key}' differs from this model's dequantised {kind} weight",
    ):
        model.load_state_dict(written, strict=False)


# --- files ----------------------------------------------------------------------------------------


def saved(model: PreTrainedModel, folder: Path, method: LoRA | None = None) -> Path:
    adapters = attach(model, method or LoRA(targets="attention"))
    randomise(adapters)
    return adapters.save(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_an_adapter_says_what_it_was_trained_over(arch, kind, dtype, tmp_path, caplog) -> None:
    folder = saved(base(arch, kind, dtype), tmp_path / "adapter")
    load(base(arch, kind, dtype), folder)
    assert not caplog.records
    plain = tiny_models.build(arch)
    plain.config._name_or_path = "another name"  # the fingerprint of the weights still matches
    load(plain, folder)
    assert (
        f"The adapter was trained on {kind} weights and runs on float32 ones; the original weights, rounded "
        "to bfloat16, are the same."
    ) in caplog.text


def test_the_other_way_round(kind: str, tmp_path, caplog) -> None:
    folder = saved(tiny_models.build("llama"), tmp_path / "adapter")
    load(base(kind=kind), folder)
    assert f"trained on float32 weights and runs on {kind} ones" in caplog.text
    model = base(kind="int8" if kind == "nf4" else "nf4")
    load(model, saved(base(kind=kind), tmp_path / "quantised"))
    assert f"trained on {kind} weights and runs on" in caplog.text


def test_another_base_is_refused(kind: str, tmp_path) -> None:
    folder = saved(base(kind=kind), tmp_path / "adapter")
    other = tiny_models.build("llama", seed=1)
    with pytest.raises(WrongBaseError, match="weights differ"):
        load(other, folder)
    quantise(other, kind)  # type: ignore[arg-type]
    with pytest.raises(WrongBaseError, match="weights differ"):
        load(other, folder)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_peft_computes_the_same_on_the_same_base(method: LoRA, kind: str, tmp_path) -> None:
    model = base(kind=kind, **WIDE)
    adapters = attach(model, method, seed=0)
    randomise(adapters, scale=0.1)
    folder, expected = adapters.save(tmp_path / "adapter"), logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(base(kind=kind, **WIDE), folder)
    bits = "Linear4bit" if kind == "nf4" else "Linear8bitLt"
    wrapper = theirs.base_model.model.model.layers[0].self_attn.q_proj
    assert type(wrapper).__module__ == "peft.tuners.lora.bnb"
    assert type(wrapper).__name__ == bits
    # float32 on both sides; PEFT scales after the second product, and DoRA's norms go through W + dW.
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-4, atol=1e-4)


# --- a base that transformers quantised -----------------------------------------------------------


@pytest.fixture
def foreign(tmp_path: Path) -> PreTrainedModel:
    tiny_models.build("llama", **WIDE).save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=config, dtype=torch.float32
    )


def test_adapters_on_a_base_that_transformers_quantised(foreign: Any, tmp_path) -> None:
    before = tensors_of(foreign)
    adapters = attach(foreign, LoRA(targets="all-linear"))
    randomise(adapters, scale=0.1)
    expected = logits(foreign)
    adapters.merge()
    torch.testing.assert_close(logits(foreign), expected, **TOLERANCE)
    adapters.unmerge()
    foreign.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(again), expected, **TOLERANCE)
    adapters.detach()
    assert_same_state(foreign, before)
    assert foreign.is_quantized


def test_its_biases_are_not_trained(tmp_path: Path) -> None:
    tiny_models.build("qwen2", hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    with pytest.raises(ConfigurationError, match=r"bias of bitsandbytes' Linear4bit.*rounds it"):
        attach(model, LoRA(bias="lora_only"))
