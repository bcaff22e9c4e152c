"""Dropout acts on the input of the adapter's branch; the frozen layer computes with the whole input."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakit import LoRA, attach
from lorakit.ops.dropout import dropout

LAYERS = {
    "linear": (lambda: nn.Linear(16, 12), (4, 5, 16)),
    "conv1d of GPT-2": (lambda: Conv1D(12, 16), (4, 5, 16)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3), (2, 4, 8, 8)),
}


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_frozen_path_has_no_dropout(kind: str, dora: bool) -> None:
    make, shape = LAYERS[kind]
    model = nn.Sequential(make())
    x = torch.randn(shape)
    base = model(x)
    adapters = attach(model, LoRA(rank=2, targets="0", dropout=0.5, dora=dora), seed=0)
    model.train()
    # B is zero, so the branch adds nothing, whatever it drops.
    torch.testing.assert_close(model(x), base, rtol=1e-6, atol=1e-6)
    assert adapters.method().dropout == 0.5


def test_the_branch_drops_its_input() -> None:
    model = nn.Sequential(nn.Linear(16, 12)).double()
    x = torch.randn(4, 5, 16, dtype=torch.float64)
    base = model(x)
    method = LoRA(rank=2, alpha=6, targets="0", dropout=0.5)
    module = attach(model, method, dtype=torch.float64).modules()["0"]
    nn.init.normal_(module.lora_B)
    torch.manual_seed(3)
    output = model.train()(x)
    torch.manual_seed(3)
    dropped = dropout(x, 0.5)
    assert 0.3 < (dropped == 0).double().mean() < 0.7
    expected = base + 3 * dropped @ module.lora_A.T @ module.lora_B.T
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
