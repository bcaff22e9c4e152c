"""The adapter gets the layer's input, however the layer is called and whatever else it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from random_adapters import randomise
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit.adapters import attach
from lorakit.methods import LoRA


class ScaleAfterInput(nn.Linear):
    def forward(self, input: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(input) * scale


class MaskBeforeHidden(nn.Linear):
    def forward(self, mask: Tensor, hidden: Tensor) -> Tensor:
        return super().forward(hidden)


class MaskBeforeInput(nn.Linear):
    def forward(self, mask: Tensor, input: Tensor) -> Tensor:
        return super().forward(input)


X = torch.linspace(-1, 1, 24).view(3, 8)
MASK = torch.ones(3, 8)  # has the input's shape, so that a mistake raises no error
LINEAR_CALLS = {
    "one": (nn.Linear, lambda layer: layer(X)),
    "one by keyword": (nn.Linear, lambda layer: layer(input=X)),
    "conv1d by keyword": (Conv1D, lambda layer: layer(x=X)),
    "scale first": (ScaleAfterInput, lambda layer: layer(scale=2.0, input=X)),
    "mask, hidden": (MaskBeforeHidden, lambda layer: layer(MASK, X)),
    "mask, hidden=": (MaskBeforeHidden, lambda layer: layer(MASK, hidden=X)),
    "input=, mask=": (MaskBeforeInput, lambda layer: layer(input=X, mask=MASK)),
}


@pytest.mark.parametrize(("kind", "call"), LINEAR_CALLS.values(), ids=LINEAR_CALLS)
def test_a_linear_layer(
    kind: type[nn.Linear] | type[Conv1D], call: Callable[[nn.Module], Tensor]
) -> None:
    layer = kind(8, 8)
    base = call(layer).detach()
    adapters = attach(nn.Sequential(layer), LoRA(rank=2, alpha=3, targets="0"))
    randomise(adapters)
    module: Any = adapters.modules()["0"]
    delta = 1.5 * X @ module.lora_A.T @ module.lora_B.T
    assert delta.abs().max() > 1e-2
    torch.testing.assert_close(call(layer), base + delta)
    with adapters.per_sample(["default", None, "default"]):
        delta[1] = 0
        torch.testing.assert_close(call(layer), base + delta)


def test_an_embedding_and_a_convolution_by_keyword() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Conv1d(4, 4, 1))
    ids, x = torch.tensor([[1, 2]]), torch.randn(2, 4, 5)
    adapters = attach(model, LoRA(rank=2, targets=("0", "1")))
    randomise(adapters)
    for layer, value in ((model[0], ids), (model[1], x)):
        assert torch.equal(layer(input=value), layer(value))
        assert not torch.equal(layer(value), layer.forward(value))
