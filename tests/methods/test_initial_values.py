"""The initial numbers of each method: their distribution, and no effect before the first step."""

from __future__ import annotations

import copy
import math

import pytest
import tiny_models
import torch
from torch import nn

import lorakit
from lorakit import BottleneckAdapter, LoRA, PrefixEmbedding, PrefixLayer
from lorakit.methods import Method

loralib = pytest.importorskip("loralib")

IN, OUT, RANK = 400, 300, 64


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(IN, OUT)
        self.body = nn.Linear(IN, OUT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def factors(target: str, init: str) -> tuple[torch.Tensor, torch.Tensor]:
    adapters = lorakit.attach(Net(), LoRA(rank=RANK, targets=target, init=init), seed=0)
    (module,) = adapters.modules("default").values()
    return module.lora_A.detach(), module.lora_B.detach()


def test_kaiming_of_a_linear_layer_is_that_of_loralib() -> None:
    A, B = factors("body", "kaiming")
    bound = 1 / math.sqrt(IN)
    assert not B.any()
    assert 0.99 * bound < float(A.abs().max()) <= bound
    assert float(A.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    theirs = loralib.Linear(IN, OUT, r=RANK).lora_A.detach()
    assert 0.99 * bound < float(theirs.abs().max()) <= bound
    assert float(A.std()) == pytest.approx(float(theirs.std()), rel=0.03)


def test_gaussian_of_a_linear_layer_is_that_of_the_paper() -> None:
    A, B = factors("body", "gaussian")
    assert not B.any()
    assert float(A.std()) == pytest.approx(0.02, rel=0.02)
    assert float(A.abs().max()) > 3 * 0.02  # not uniform


@pytest.mark.parametrize(("init", "deviation"), [("kaiming", 1.0), ("gaussian", 0.02)])
def test_an_embedding_starts_with_a_random_b_as_in_loralib(init: str, deviation: float) -> None:
    A, B = factors("table", init)
    assert not A.any()
    assert float(B.std()) == pytest.approx(deviation, rel=0.02)
    if init == "kaiming":
        theirs = loralib.Embedding(IN, OUT, r=RANK)
        assert not theirs.lora_A.any()
        assert float(theirs.lora_B.detach().std()) == pytest.approx(deviation, rel=0.02)


@pytest.mark.parametrize(
    "method",
    [
        BottleneckAdapter(kind="houlsby", size=32),
        PrefixEmbedding(prefix_length=64, infix_length=0),
        PrefixLayer(prefix_length=64, infix_length=0),
    ],
    ids=lambda method: type(method).__name__,
)
def test_the_deviation_of_other_methods(method: Method) -> None:
    adapters = lorakit.attach(tiny_models.build("gpt2"), method, seed=0)
    values = [
        parameter.detach().flatten()
        for module in adapters.modules("default").values()
        for parameter in module.parameters()
        if parameter.ndim > 1
    ]
    assert float(torch.cat(values).std()) == pytest.approx(0.02, rel=0.05)


def test_pissa_of_a_grouped_convolution_decomposes_each_group(tmp_path) -> None:
    """The initial factors of a group are beside its trained ones, in the pass, the merge and a file."""
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 8, 3, groups=2)
    model, x = nn.Sequential(conv), torch.randn(2, 6, 5, 5)
    base, start = model(x), copy.deepcopy(model.state_dict())
    handle = lorakit.attach(model, LoRA(rank=4, alpha=8, targets="0", init="pissa"))
    torch.testing.assert_close(model(x), base, rtol=0, atol=1e-5)
    (module,) = handle.modules("default").values()
    A, B = module.lora_A.detach().flatten(1), module.lora_B.detach().flatten(1)
    for W, a, b in zip(conv.weight.flatten(1).chunk(2), A.chunk(2), B.chunk(2), strict=True):
        U, S, Vh = torch.linalg.svd(W.detach(), full_matrices=False)
        best = U[:, :2] * S[:2] @ Vh[:2]
        torch.testing.assert_close(module.scaling * b @ a, best, rtol=0, atol=1e-5)
    with torch.no_grad():
        for parameter in handle.trainable_parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    output = model(x)
    handle.save(tmp_path / "adapter")
    handle.merge()
    torch.testing.assert_close(model(x), output, rtol=0, atol=1e-4)
    fresh = nn.Sequential(nn.Conv2d(6, 8, 3, groups=2))
    fresh.load_state_dict(start)
    lorakit.load(fresh, tmp_path / "adapter")
    torch.testing.assert_close(fresh(x), output, rtol=0, atol=1e-5)
