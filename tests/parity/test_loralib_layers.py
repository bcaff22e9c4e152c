"""loralib's layers as reference: the same A and B give the same outputs and merged weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import loralib
import pytest
import tiny_models
import torch
from logits import assert_differ, assert_same
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit import Adapters, LoRA, attach, load

RANK, ALPHA = 3, 5.0
TIGHT = 1e-12
"""All layers compute in float64."""


def vectors() -> Tensor:
    return torch.randn(2, 7, 32, dtype=torch.float64)


def ids() -> Tensor:
    return torch.randint(0, 20, (2, 7))


def oracle(build: type[nn.Module], *args, **settings) -> nn.Module:
    """Return an unmerged loralib layer with random base weights and random A and B."""
    layer = build(*args, r=RANK, lora_alpha=ALPHA, **settings).double()
    nn.Module.train(layer)  # bypasses loralib's train(), which merges and unmerges
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def base_weights(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    return layer.weight, getattr(layer, "bias", None)


def twin(of: nn.Module, plain: nn.Module) -> nn.Module:
    """Return a model of the plain layer with the base weights of loralib's layer."""
    weight, bias = base_weights(of)
    plain = plain.double()
    with torch.no_grad():
        plain.weight.copy_(weight)
        if bias is not None:
            plain.bias.copy_(bias)
    return nn.Sequential(plain)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "Linear": (
        lambda: oracle(loralib.Linear, 32, 16),
        lambda: nn.Linear(32, 16),
        vectors,
    ),
    "Linear without bias": (
        lambda: oracle(loralib.Linear, 32, 16, bias=False),
        lambda: nn.Linear(32, 16, bias=False),
        vectors,
    ),
    "Linear transposed": (
        lambda: oracle(loralib.Linear, 32, 16, fan_in_fan_out=True),
        lambda: Conv1D(16, 32),
        vectors,
    ),
    "Embedding": (
        lambda: oracle(loralib.Embedding, 20, 16),
        lambda: nn.Embedding(20, 16),
        ids,
    ),
    "Embedding with padding": (
        lambda: oracle(loralib.Embedding, 20, 16, padding_idx=3),
        lambda: nn.Embedding(20, 16, padding_idx=3),
        ids,
    ),
}
"""The plain layers of loralib 0.1.2; its convolutions are not read."""


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def check(theirs: nn.Module, model: nn.Module, handle: Adapters, x: Tensor) -> None:
    """Compare outputs and merged weights of a layer in both libraries."""
    handle.activate(None)
    base = model(x)
    handle.activate(*handle.names)
    assert_differ(model(x), base)
    assert_same(model(x), theirs(x), TIGHT)
    unmerged = base_weights(theirs)[0].clone()
    theirs.eval()
    merged = base_weights(theirs)[0]
    assert_differ(merged, unmerged)
    handle.merge()
    assert_same(model[0].weight, merged, TIGHT)
    assert_same(model(x), theirs(x), TIGHT)


@pytest.mark.parametrize("name", LAYERS)
def test_attached_with_the_same_factors(name: str):
    make, plain, x = LAYERS[name]
    theirs = make()
    model = twin(theirs, plain())
    handle = attach(model, LoRA(rank=RANK, alpha=ALPHA, targets="0"), dtype=torch.float64)
    module = handle.modules()["0"]
    assert module.lora_A.shape == theirs.lora_A.shape
    module.lora_A.copy_(theirs.lora_A)
    module.lora_B.copy_(theirs.lora_B)
    check(theirs, model, handle, x())


@pytest.mark.parametrize("name", LAYERS)
def test_loaded_from_loralibs_file(name: str, tmp_path: Path):
    make, plain, x = LAYERS[name]
    theirs = make()
    model = twin(theirs, plain())
    torch.save(loralib.lora_state_dict(nn.Sequential(theirs)), tmp_path / "lora.pt")
    handle = load(model, tmp_path / "lora.pt", alpha=ALPHA)
    check(theirs, model, handle, x())


# --- MergedLinear: slices of a fused projection --------------------------------------------------

SLICES = {"q": "TFF", "k": "FTF", "v": "FFT", "qv": "TFT", "kv": "FTT", "qkv": "TTT"}
FUSED = {
    "gpt2": ("transformer.h.0.attn.c_attn", {"fan_in_fan_out": True}),
    "ModernBert": ("layers.0.attn.Wqkv", {"bias": False}),
}
"""Tiny models whose fused layer has q, k, v as thirds, transposed or not."""


@pytest.mark.parametrize("letters", SLICES)
@pytest.mark.parametrize("arch", FUSED)
def test_merged_linear(arch: str, letters: str):
    path, settings = FUSED[arch]
    enabled = [flag == "T" for flag in SLICES[letters]]
    theirs = oracle(loralib.MergedLinear, 32, 96, enable_lora=enabled, **settings)
    model = tiny_models.build(arch).double()
    layer = model.get_submodule(path)
    weight, bias = base_weights(theirs)
    layer.weight.copy_(weight)
    if bias is not None:
        layer.bias.copy_(bias)
    method = LoRA(rank=RANK, alpha=ALPHA, targets=f"attention.{letters}")
    handle = attach(model, method, dtype=torch.float64)
    module = handle.modules()[path]
    assert module.lora_A.shape == theirs.lora_A.shape
    assert module.lora_B.shape == theirs.lora_B.shape
    module.lora_A.copy_(theirs.lora_A)
    module.lora_B.copy_(theirs.lora_B)

    x = vectors()
    handle.activate(None)
    base = layer(x)
    handle.activate("default")
    assert_differ(layer(x), base)
    assert_same(layer(x), theirs(x), TIGHT)
    off = [i for i, flag in enumerate(enabled) if not flag]
    for third in off:
        rows = slice(32 * third, 32 * third + 32)
        assert torch.equal(layer(x)[..., rows], base[..., rows])
    theirs.eval()
    handle.merge()
    assert_same(layer.weight, theirs.weight, TIGHT)
