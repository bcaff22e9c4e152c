"""Bottleneck adapters against their formulas, written out in float64 over the base's own parts."""

from __future__ import annotations

import math

import pytest
import tiny_models
import torch
from random_adapters import randomise
from torch import Tensor
from transformers import PreTrainedModel

from lorakit import Adapters, BottleneckAdapter, LoRA, attach, count_parameters, load, targets
from lorakit.errors import AdapterFileError, ConfigurationError, TargetError
from lorakit.methods.bottleneck_module import Bottleneck
from lorakit.models.blocks import stacks

IDS = torch.tensor([[5, 8, 13, 21, 34, 55], [89, 7, 3, 11, 18, 29]])


def float64(arch: str, method: BottleneckAdapter) -> tuple[PreTrainedModel, Adapters]:
    model = tiny_models.build(arch).double()
    adapters = attach(model, method, dtype=torch.float64)
    randomise(adapters)
    return model, adapters


# --- the formulas -------------------------------------------------------------------------------


def bottleneck(module: Bottleneck, x: Tensor, activation: str) -> Tensor:
    """``W_up act(W_down x + b_down) + b_up``, entry by entry of the definition."""
    if module.norm_weight is not None:
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).square().mean(-1, keepdim=True)
        x = (x - mean) / (variance + 1e-5).sqrt() * module.norm_weight + module.norm_bias
    h = torch.einsum("rd,bsd->bsr", module.down_weight, x) + module.down_bias
    h = {
        "relu": lambda: h.clamp(min=0),
        "silu": lambda: h / (1 + (-h).exp()),
        "gelu": lambda: h * 0.5 * (1 + torch.erf(h / math.sqrt(2))),
    }[activation]()
    return torch.einsum("dr,bsr->bsd", module.up_weight, h) + module.up_bias


def gpt2_blocks(model: PreTrainedModel, kind: str, adapters: Adapters) -> Tensor:
    """Final hidden states of a GPT-2 with adapters, from the base's own sub-layers called one by one."""
    body = model.transformer
    positions = torch.arange(IDS.shape[1])
    x = body.wte.weight[IDS] + body.wpe.weight[positions]
    modules = {path: module for path, module in adapters.modules().items()}
    adapters.activate(None)  # the parts called below are the base's
    for i, block in enumerate(body.h):
        at = f"transformer.h.{i}"
        mask = torch.full((IDS.shape[1],) * 2, -1e300, dtype=x.dtype).triu(1)[None, None]
        u = block.attn(block.ln_1(x), attention_mask=mask)[0]
        if kind == "houlsby":
            u = u + bottleneck(modules[f"{at}.attn.resid_dropout"], u, "silu")
        x = x + u
        u = block.mlp(block.ln_2(x))
        if kind == "houlsby":
            u = u + bottleneck(modules[f"{at}.mlp.dropout"], u, "silu")
        x = x + u
        if kind != "houlsby":
            x = x + bottleneck(modules[at], x, "relu")
    adapters.activate("default")
    return body.ln_f(x)


def bert_blocks(model: PreTrainedModel, kind: str, adapters: Adapters) -> Tensor:
    """The same for BERT, whose blocks end with a LayerNorm of the residual sum."""
    x = model.bert.embeddings(IDS)
    modules = adapters.modules()
    adapters.activate(None)
    for i, block in enumerate(model.bert.encoder.layer):
        at = f"bert.encoder.layer.{i}"
        u = block.attention.output.dense(block.attention.self(x)[0])
        if kind == "houlsby":
            u = u + bottleneck(modules[f"{at}.attention.output.dropout"], u, "silu")
        x = block.attention.output.LayerNorm(u + x)
        u = block.output.dense(block.intermediate(x))
        norm = block.output.LayerNorm
        if kind == "houlsby":
            u = u + bottleneck(modules[f"{at}.output.dropout"], u, "silu")
            x = norm(u + x)
        elif kind == "pfeiffer":  # the paper's code: the same LayerNorm twice
            v = norm(u + x)
            w = bottleneck(modules[f"{at}.output.LayerNorm"], v, "relu") + u
            x = norm(w + x)
        else:
            x = norm(u + x)
            x = x + bottleneck(modules[f"{at}.output.LayerNorm"], x, "relu")
    adapters.activate("default")
    return x


@pytest.mark.parametrize("kind", ["houlsby", "lin", "pfeiffer"])
@pytest.mark.parametrize(("arch", "reference"), [("gpt2", gpt2_blocks), ("bert", bert_blocks)])
@torch.no_grad()
def test_hidden_states_in_float64(arch: str, reference, kind: str) -> None:
    model, adapters = float64(arch, BottleneckAdapter(kind=kind, size=5))
    actual = model.base_model(IDS).last_hidden_state
    expected = reference(model, kind, adapters)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)
    adapters.activate(None)
    assert (model.base_model(IDS).last_hidden_state - actual).abs().max() > 1e-2


@torch.no_grad()
def test_each_activation() -> None:
    for activation in ("relu", "silu", "gelu"):
        method = BottleneckAdapter(kind="pfeiffer", size=5, activation=activation)
        model, adapters = float64("llama", method)
        module = adapters.modules()["model.layers.1"]
        x = torch.randn(2, 3, 32, dtype=torch.float64)
        actual = module.adapt(model.model.layers[1], x, x, 1.0)
        torch.testing.assert_close(actual, x + bottleneck(module, x, activation))


def test_it_acts_after_the_dropout_of_the_base() -> None:
    """Dropout applies to the sub-layer's output, not to the adapter's."""
    model = tiny_models.build("gpt2", resid_pdrop=0.5).train()
    adapters = attach(model, BottleneckAdapter(size=4))
    randomise(adapters)
    with torch.no_grad():
        for module in adapters.modules().values():
            module.up_bias.fill_(100.0)
    outputs = []
    model.transformer.h[0].mlp.register_forward_hook(lambda m, x, out: outputs.append(out))
    model(IDS)
    assert outputs[0].min() > 50  # a dropped output would be 0


def test_narrow_bases_keep_wide_masters() -> None:
    model = tiny_models.build("llama").bfloat16()
    adapters = attach(model, BottleneckAdapter(kind="lin", size=4))
    randomise(adapters, scale=0.1)
    logits = model(IDS).logits
    assert logits.dtype == torch.bfloat16
    logits.float().tanh().sum().backward()
    assert {p.dtype for p in adapters.trainable_parameters()} == {torch.float32}
    assert all(p.grad.dtype == torch.float32 for p in adapters.trainable_parameters())


# --- positions ------------------------------------------------------------------------------------


def test_dropped_layers_have_none() -> None:
    model = tiny_models.build("t5")
    adapters = attach(model, BottleneckAdapter(kind="lin", size=4, drop_layers=(1,)))
    assert list(adapters.modules()) == ["encoder.block.0", "decoder.block.0"]


def test_an_adapted_model_offers_the_same_targets_and_blocks() -> None:
    model = tiny_models.build("bert")
    before = str(targets(model)), stacks(model), count_parameters(model, LoRA(targets=".*dense"))
    for kind in ("houlsby", "lin", "pfeiffer"):
        adapters = attach(model, BottleneckAdapter(kind=kind, size=4), name=kind)
    after = str(targets(model)), stacks(model), count_parameters(model, LoRA(targets=".*dense"))
    assert after == before
    attach(model, LoRA(rank=2, targets="all-linear"), name="lora")
    for name in ("houlsby", "pfeiffer", "lora", "lin"):
        adapters.remove(name)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "hulsby"}, "Did you mean 'houlsby'"),
        ({"size": 0}, "size is 0"),
        ({"size": 2.5}, "whole number"),
        ({"activation": "swish"}, "relu, gelu, silu"),
        ({"drop_layers": (-1,)}, "counted from 0"),
        ({"drop_layers": 1}, "drop_layers is 1"),
        ({"train_modules": ("",)}, "train_modules"),
    ],
    ids=str,
)
def test_settings_that_cannot_work(settings: dict, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        BottleneckAdapter(**settings)


@pytest.mark.parametrize(
    ("arch", "method", "error", "message"),
    [
        ("llama", BottleneckAdapter(size=33), ConfigurationError, "Use at most 32"),
        ("llama", BottleneckAdapter(drop_layers=(2,)), ConfigurationError, "blocks 0 to 1"),
        ("llama", BottleneckAdapter(drop_layers=(0, 1)), TargetError, "trains nothing"),
        ("llama", BottleneckAdapter(size=4, train_modules="score"), TargetError, "'score'"),
        ("mixtral", BottleneckAdapter(), TargetError, "lin or pfeiffer"),
    ],
    ids=str,
)
def test_models_that_it_does_not_fit(arch: str, method, error, message: str) -> None:
    model = tiny_models.build(arch)
    with pytest.raises(error, match=message):
        attach(model, method)
    assert not any(m._forward_hooks for m in model.modules())


# --- files ----------------------------------------------------------------------------------------


def test_a_file_for_other_blocks_is_refused(tmp_path) -> None:
    adapters = attach(tiny_models.build("gpt2"), BottleneckAdapter(kind="lin", size=4))
    adapters.save(tmp_path / "two")
    for settings, message in (
        ({"n_layer": 3}, "no tensor for 'transformer.h.2'"),
        ({"n_embd": 16}, "size mismatch"),
    ):
        model = tiny_models.build("gpt2", **settings)
        with pytest.raises(AdapterFileError, match=message):
            load(model, tmp_path / "two", allow_other_base=True)
        assert not any(m._forward_hooks for m in model.modules())
