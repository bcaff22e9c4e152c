"""An adapted embedding treats `padding_idx` as `nn.Embedding` does: the value is looked up, the row is not trained."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from random_adapters import randomise
from torch import nn

from lorakit.adapters import attach
from lorakit.methods import LoRA

PADDING = 1
IDS = torch.tensor([[2, 5, PADDING], [PADDING, 2, 7]])


def table() -> nn.Sequential:
    model = nn.Sequential(nn.Embedding(9, 8, padding_idx=PADDING))
    nn.init.normal_(
        model[0].weight
    )  # a pre-trained table may have a padding vector that is not zero
    return model


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"init": "pissa"}], ids=str)
def test_the_padding_row_gets_no_gradient(options: dict) -> None:
    model = table()
    adapters = attach(model, LoRA(rank=2, targets="0", **options))
    randomise(adapters)
    module = adapters.modules()["0"]
    model(IDS).sin().sum().backward()
    gradient = module.lora_A.grad
    assert gradient[:, PADDING].abs().max() == 0
    assert gradient[:, [2, 5, 7]].abs().min() > 0


def test_the_gradient_is_that_of_the_table() -> None:
    """``dA = scaling * B^T dE^T``, with dE from `nn.Embedding` on the merged table."""
    model = table()
    adapters = attach(model, LoRA(rank=2, alpha=3, targets="0"))
    randomise(adapters)
    module = adapters.modules()["0"]
    model(IDS).sin().sum().backward()
    merged = (model[0].weight.T + 1.5 * module.lora_B @ module.lora_A).detach().requires_grad_()
    F.embedding(IDS, merged.T, PADDING).sin().sum().backward()
    torch.testing.assert_close(module.lora_A.grad, 1.5 * module.lora_B.T @ merged.grad)


def test_the_padding_value_is_the_formula_s_and_the_merge_is_exact() -> None:
    model = table()
    adapters = attach(model, LoRA(rank=2, alpha=3, targets="0"))
    randomise(adapters)  # as a file may, sets the padding column of A
    module = adapters.modules()["0"]
    base = model[0].weight[PADDING]
    expected = base + 1.5 * module.lora_B @ module.lora_A[:, PADDING]
    unmerged = model(IDS)
    torch.testing.assert_close(unmerged[0, 2], expected)
    assert (expected - base).abs().max() > 1e-2
    adapters.merge()
    torch.testing.assert_close(model(IDS), unmerged)


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_training_leaves_the_padding_vector(init: str) -> None:
    model = table()
    before = model(IDS).detach()
    adapters = attach(model, LoRA(rank=2, targets="0", init=init))  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(adapters.trainable_parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(IDS).sin().sum().backward()
        optimizer.step()
    after = model(IDS)
    is_padding = IDS == PADDING
    torch.testing.assert_close(after[is_padding], before[is_padding], atol=1e-6, rtol=0)
    assert (after - before)[~is_padding].abs().max() > 0.1
