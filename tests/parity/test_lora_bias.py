"""A bias of B (`lora_bias`): forward, gradients, batches, merging, files and refusals, compared with PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import peft_models
import pytest
import tiny_models
import torch
from logits import assert_differ, assert_same, randomise
from safetensors.torch import load_file
from tiny_models import tensors_of
from torch import Tensor, nn

import lorakit
from lorakit import LoRA
from lorakit.adapters import formats
from lorakit.analysis.deltas import notices
from lorakit.analysis.derived import require_low_rank
from lorakit.errors import AdapterFileError, AdapterStateError, ConfigurationError

TIGHT = 1e-10


class Net(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first = nn.Linear(6, 8, bias=bias)
            self.conv = nn.Conv1d(1, 4, 3, bias=bias)
            self.last = nn.Linear(24, 5, bias=bias)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        return self.last(self.conv(x[:, None]).flatten(1))


X = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
METHOD = LoRA(rank=2, alpha=5.0, targets=("first", "last"), lora_bias=True)


def attached(net: nn.Module, method: LoRA = METHOD, seed: int = 2, name: str = "default"):
    handle = lorakit.attach(net, method, dtype=torch.float64, seed=1, name=name)
    randomise(handle.trainable_parameters(name), seed=seed)
    return handle


def test_it_starts_without_effect_and_adds_the_scaled_bias():
    net = Net()
    base = net(X)
    handle = lorakit.attach(net, METHOD, dtype=torch.float64)
    assert torch.equal(net(X), base)
    module = net.last.adapters["default"]
    with torch.no_grad():
        module.lora_B_bias.copy_(torch.arange(5))
    assert_same(net(X), base + 2.5 * torch.arange(5), TIGHT)
    handle.activate({"default": 0.5})  # linear in the weight
    assert_same(net(X), base + 1.25 * torch.arange(5), TIGHT)
    # B's biases count: 8 and 5 rows beside the factors.
    assert (
        sum(p.numel() for p in handle.trainable_parameters()) == 2 * (6 + 8) + 2 * (24 + 5) + 8 + 5
    )


def test_gradients_and_dropout_are_pefts():
    method = LoRA(rank=2, alpha=5.0, targets=("first", "conv", "last"), lora_bias=True)
    config = peft.LoraConfig(
        r=2, lora_alpha=5, target_modules=["first", "conv", "last"], lora_bias=True
    )
    theirs = peft_models.adapt(Net(), config)
    net = Net()
    handle = lorakit.attach(net, method, dtype=torch.float64)
    with torch.no_grad():
        for path in ("first", "conv", "last"):
            ours, layer = (
                net.get_submodule(path).adapters["default"],
                theirs.base_model.model.get_submodule(path),
            )
            for tensor, source in (
                (ours.lora_A, layer.lora_A["default"].weight),
                (ours.lora_B, layer.lora_B["default"].weight),
                (ours.lora_B_bias, layer.lora_B["default"].bias),
            ):
                tensor.copy_(source)
    assert_same(net(X), theirs(X), TIGHT)
    net(X).square().sum().backward()
    theirs(X).square().sum().backward()
    for path in ("first", "conv", "last"):
        layer = theirs.base_model.model.get_submodule(path)
        ours = net.get_submodule(path).adapters["default"]
        assert_same(ours.lora_B_bias.grad, layer.lora_B["default"].bias.grad, TIGHT)
        assert_same(ours.lora_B.grad, layer.lora_B["default"].weight.grad, TIGHT)
    handle.detach()


def test_rows_with_and_without_it():
    net = Net()
    base = net(X)
    handle = attached(net)
    with_bias = net(X)
    attached(net, LoRA(rank=2, targets="first"), seed=4, name="plain")
    plain = net(X)
    mixed = {"default": 0.5, "plain": 0.25}
    handle.activate(mixed)
    blend = net(X)
    handle.activate("default")
    with handle.per_sample(["default", None, "plain", mixed]):
        rows = net(X)
    for i, expected in enumerate((with_bias, base, plain, blend)):
        assert_same(rows[i], expected[i], TIGHT)


@pytest.mark.parametrize("bias", ["none", "lora_only"])
def test_merge_and_unmerge(bias):
    net = Net()
    base, weights = net(X), tensors_of(net)
    handle = attached(
        net, LoRA(rank=2, alpha=5.0, targets=("first", "last"), lora_bias=True, bias=bias)
    )
    expected = net(X)
    assert_differ(expected, base)
    handle.merge()
    assert_same(net(X), expected, TIGHT)
    assert_differ(net.last.bias, weights["last.bias"])
    handle.unmerge()
    assert torch.equal(net(X), expected)
    handle.merge()
    handle.unmerge()
    handle.detach()
    assert torch.equal(net(X), base)
    assert all(torch.equal(net.state_dict()[key], tensor) for key, tensor in weights.items())
    handle = attached(
        net, LoRA(rank=2, alpha=5.0, targets=("first", "last"), lora_bias=True, bias=bias)
    )
    handle.merge(keep_base=False)
    assert net.state_dict().keys() == weights.keys()
    assert_same(net(X), expected, TIGHT)


def test_a_layer_without_bias_is_adapted_but_not_merged():
    net = Net(bias=False)
    base = net(X)
    handle = attached(net)
    expected = net(X)
    with pytest.raises(AdapterStateError, match="its effect at 'first' is not a weight change"):
        handle.merge()
    assert torch.equal(net(X), expected)
    handle.detach()
    assert torch.equal(net(X), base)


def test_slices_of_a_fused_projection(tmp_path: Path):
    model = tiny_models.build("gpt2").double().eval()
    batch = {"input_ids": torch.tensor([[3, 1, 4, 1, 5]])}
    handle = attached(model, LoRA(rank=2, targets="attention.qv", lora_bias=True))
    expected = model(**batch).logits
    folder = handle.save(tmp_path / "adapter")
    stored = formats.read(folder)
    layer = next(iter(stored.layers.values()))
    assert layer.B_bias is not None
    assert layer.B_bias.shape == layer.B.shape[:1]
    again = tiny_models.build("gpt2").double().eval()
    lorakit.load(again, folder)
    assert torch.equal(again(**batch).logits, expected)
    theirs = peft_models.load(tiny_models.build("gpt2").double().eval(), folder)
    assert_same(theirs(**batch).logits, expected, TIGHT)
    handle.merge()
    assert_same(model(**batch).logits, expected, TIGHT)


def test_generation_decodes_with_it():
    model = tiny_models.build("gpt2").eval()
    handle = attached(model.double(), LoRA(rank=2, targets="all-linear", lora_bias=True))
    ids = torch.tensor([[3, 1, 4]])
    with torch.no_grad():
        cached = model.generate(ids, max_new_tokens=6, do_sample=False)
        plain = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)
    handle.detach()


def test_files(tmp_path: Path):
    net = Net()
    handle = attached(net)
    folder = handle.save(tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["lora_bias"] is True
    tensors = load_file(folder / "adapter_model.safetensors")
    assert tensors["base_model.model.last.lora_B.bias"].shape == (5,)
    stored = formats.read(folder)
    assert stored.num_parameters == 2 * (6 + 8) + 2 * (24 + 5) + 8 + 5
    assert "B has a bias in 2 layers (lora_bias), which B A does not cover." in notices(stored)
    assert "lora_bias=True" in (folder / "README.md").read_text()
    with pytest.raises(AdapterFileError, match="which compress and combine do not support"):
        require_low_rank(stored)
    with pytest.raises(AdapterFileError, match="loralib has no bias of B"):
        formats.write_loralib(stored, tmp_path / "loralib.pt")
    for change, message in (
        ({"lora_bias": False}, "lora_B.bias; with use_dora false and lora_bias false"),
        ({"use_dora": True}, "with use_dora true and lora_bias"),
    ):
        (folder / "lorakit.json").unlink(missing_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(AdapterFileError, match=message):
            formats.read(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": "first", "dora": True}, "dora and lora_bias exclude each other"),
        ({"targets": "table"}, "lora_bias cannot be used on Embedding"),
        ({"targets": "attn"}, "lora_bias cannot be used on MultiheadAttention"),
        ({"targets": "attn.out_proj"}, "lora_bias cannot be used on NonDynamically"),
    ],
)
def test_refusals(settings: dict, message: str):
    net = nn.ModuleDict(
        {"first": nn.Linear(4, 4), "table": nn.Embedding(5, 4), "attn": nn.MultiheadAttention(4, 2)}
    )
    with pytest.raises(ConfigurationError, match=message):
        lorakit.attach(net, LoRA(rank=2, lora_bias=True, **settings))


def test_peft_ignores_part_of_it_in_attention(tmp_path: Path):
    net = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2)})
    config = peft.LoraConfig(r=2, target_modules=["attn"], lora_bias=True)
    adapted = peft_models.adapt(net, config)
    with pytest.raises(AdapterFileError, match=r"'attn'.*cannot have a bias \(lora_bias\)"):
        formats.read(peft_models.save(adapted, tmp_path / "adapter"))
