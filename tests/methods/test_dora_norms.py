"""The norms of DoRA: of the rows of ``W + scaling * B A``, a chunk of rows at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from random_adapters import randomise
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakit.adapters import attach
from lorakit.methods import LoRA
from lorakit.methods.lora import layer as layer_module

LAYERS: dict[str, Any] = {
    "linear": lambda: nn.Linear(24, 50),
    "Conv1D": lambda: Conv1D(50, 24),
    "embedding": lambda: nn.Embedding(50, 24),
    "convolution": lambda: nn.Conv2d(4, 50, 3),
    "convolution of groups": lambda: nn.Conv1d(6, 50, 3, groups=2),
}


def module_on(layer: nn.Module, *, is_random: bool) -> Any:
    adapters = attach(nn.Sequential(layer), LoRA(rank=2, dora=True, targets="0"), seed=0)
    if is_random:
        randomise(adapters)
    return adapters.modules()["0"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", LAYERS)
def test_norms_of_chunks(monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype) -> None:
    monkeypatch.setattr(layer_module, "_CHUNK", 100)
    layer = LAYERS[kind]().to(dtype)
    module = module_on(layer, is_random=True)
    W = module.weight_matrix(layer).detach().double() + module.delta_matrix().double()
    norms = module.merged_norms(layer, *module.factors())
    assert norms.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(norms.double(), W.norm(dim=1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_new_adapter_has_no_effect(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Its norms equal its magnitudes to the bit, also where the weight is stored transposed."""
    monkeypatch.setattr(layer_module, "_CHUNK", 100)
    layer = LAYERS[kind]()
    assert torch.equal(
        module_on(layer, is_random=False).row_factors(layer),
        torch.ones(24 if kind == "embedding" else 50),
    )


@pytest.mark.parametrize("kind", ["linear", "convolution of groups"])
def test_autocast_does_not_round_the_factors(kind: str) -> None:
    layer = LAYERS[kind]()
    module = module_on(layer, is_random=True)
    expected = module.row_factors(layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module.row_factors(layer), expected)


def test_many_adapters_by_vmap() -> None:
    layer = nn.Linear(24, 50)
    module = module_on(layer, is_random=True)
    A, B = module.factors()
    several = torch.stack([A, 2 * A]), torch.stack([B, B])
    norms = torch.vmap(lambda A, B: module.merged_norms(layer, A, B))(*several)
    torch.testing.assert_close(norms[1], module.merged_norms(layer, 2 * A, B))


def test_a_weight_that_is_trained_too() -> None:
    layer = nn.Linear(24, 50)
    module = module_on(layer, is_random=True)
    layer.weight.requires_grad_()
    module.row_factors(layer).sum().backward()
    gradient, layer.weight.grad = layer.weight.grad, None
    norms = (layer.weight + module.delta_matrix().detach()).norm(dim=1)
    (module.magnitude / norms).sum().backward()
    torch.testing.assert_close(gradient, layer.weight.grad)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("factor", [0.997, 1.003, 1.006])
def test_a_small_change_of_the_magnitudes_acts_in_bfloat16(factor: float, bias: bool) -> None:
    """The numbers around 1 are multiples of 0.004 and 0.008 in bfloat16."""
    layer = nn.Linear(256, 64, bias=bias).to(torch.bfloat16)
    adapters = attach(nn.Sequential(layer), LoRA(rank=2, dora=True, targets="0"), seed=0)
    x = torch.randn(512, 256, dtype=torch.bfloat16)
    with torch.no_grad():
        before = adapters.model(x).double()
        adapters.modules()["0"].magnitude.mul_(factor)
        change = adapters.model(x).double() - before
    if layer.bias is not None:
        before -= layer.bias.double()
    gain = (change * before).sum() / (before * before).sum()
    assert gain.item() == pytest.approx(factor - 1, abs=0.0008)
