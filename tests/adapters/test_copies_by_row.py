"""Trained copies of base tensors in rows of their own: right, or refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tiny_models
import torch
import transformers
from random_adapters import randomise
from torch import Tensor, nn

from lorakit.adapters import Adapters, attach
from lorakit.errors import AdapterStateError
from lorakit.methods.bitfit import BitFit
from lorakit.methods.bottleneck import BottleneckAdapter
from lorakit.methods.full import FullFineTuning
from lorakit.methods.lora.method import LoRA

Rows = list[str | None]
IDS = torch.arange(3, 27).view(4, 6)


def adapted(model: nn.Module, **methods: object) -> Adapters:
    for name, method in methods.items():
        adapters = attach(model, method, name=name)  # type: ignore[arg-type]
    randomise(adapters)
    return adapters


def assert_right(adapters: Adapters, rows: Rows, active: str | None, call: Callable) -> None:
    """Compare a mixed batch, beside what `activate` put in place, with one run for each row."""
    separate = []
    for i, row in enumerate(rows):
        adapters.activate(row)
        separate.append(call()[i])
    adapters.activate(active)
    with adapters.per_sample(rows):
        together = call()
    torch.testing.assert_close(together, torch.stack(separate), atol=1e-5, rtol=1e-4)


def assert_refused(adapters: Adapters, rows: Rows, active: str | None, call: Callable) -> None:
    adapters.activate(active)
    with pytest.raises(AdapterStateError, match="cannot"), adapters.per_sample(rows):
        call()


DORA = LoRA(rank=2, targets="mlp", dora=True)
DORA_BIAS = LoRA(rank=2, targets="mlp", dora=True, bias="lora_only")
PFEIFFER = BottleneckAdapter(size=4, kind="pfeiffer")
PFEIFFER_NORM = BottleneckAdapter(size=4, kind="pfeiffer", train_modules=("output.LayerNorm",))


@pytest.mark.parametrize("active", ["copies", "bitfit", None])
@pytest.mark.parametrize(
    ("plain", "copies"), [(DORA, DORA_BIAS), (PFEIFFER, PFEIFFER_NORM)], ids=["dora", "pfeiffer"]
)
def test_effects_that_read_the_layer(plain, copies, active: str | None) -> None:
    """They read the bias or call the forward of their layer, whose tensors are those of the row."""
    model = tiny_models.build("bert")
    adapters = adapted(model, plain=plain, copies=copies, bitfit=BitFit())
    for rows in (["copies", "plain", None, "bitfit"], ["plain"] * 4, ["copies"] * 4, [None] * 4):
        assert_right(adapters, rows, active, lambda: model(IDS).logits)


def test_gradients_of_effects_that_read_the_layer() -> None:
    model = tiny_models.build("llama")
    adapters = adapted(model, dora=DORA, full=FullFineTuning(top_layers=1))
    adapters.activate("full")
    with adapters.per_sample(["dora"] * 4):
        model(IDS).logits.square().sum().backward()
    assert all(p.grad is None for p in adapters.trainable_parameters("full"))
    gradients = [p.grad for p in adapters.trainable_parameters("dora")]
    adapters.activate("dora")
    model.zero_grad()
    model(IDS).logits.square().sum().backward()
    expected = [p.grad for p in adapters.trainable_parameters("dora")]
    torch.testing.assert_close(gradients, expected, atol=1e-4, rtol=1e-3)


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.inner = nn.Parameter(torch.ones(8)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.inner(x) * self.scale
        return h, h.mean(1)


class UsesSecond(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = TwoOutputs()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)[1]


@pytest.mark.parametrize("rows", [["t", "a"], ["t", "t"]])
def test_layers_with_several_outputs_are_refused(rows: Rows) -> None:
    model, x = UsesSecond(), torch.randn(2, 3, 8)
    adapters = adapted(model, t=FullFineTuning(), a=LoRA(rank=2, targets="inner"))
    assert_refused(adapters, rows, None, lambda: model(x))


def test_a_trained_router_is_refused() -> None:
    model = tiny_models.build("mixtral")
    adapters = adapted(model, t=LoRA(rank=2, train_modules=("mlp.gate",)), a=LoRA(rank=2))
    assert_refused(adapters, ["t", "a", None, "t"], None, lambda: model(IDS))
    assert_refused(adapters, [None] * 4, "t", lambda: model(IDS))
    assert_right(adapters, ["a", None, "a", "a"], None, lambda: model(IDS).logits)


class ReadsTable(nn.Module):
    """Its logits read the table without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(30, 8), nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(self.table(ids)) @ self.table.weight.T


def test_tables_that_are_read_without_a_call_are_refused() -> None:
    model = ReadsTable()
    method = LoRA(rank=2, targets="inner", train_modules=("table",))
    adapters = adapted(model, t=method, a=LoRA(rank=2, targets="inner"))
    for rows in (["t", "a"] * 2, ["t"] * 4):
        assert_refused(adapters, rows, None, lambda: model(IDS))
    assert_refused(adapters, ["a"] * 4, "t", lambda: model(IDS))
    assert_right(adapters, ["a", None] * 2, None, lambda: model(IDS))


@pytest.mark.parametrize("method", [FullFineTuning(), BitFit()], ids=["full", "biases"])
def test_a_layer_that_mamba_only_reads(method: object) -> None:
    """The hook of dt_proj, which gives it the base's weights for a block, never runs."""
    config = transformers.MambaConfig(
        hidden_size=16, num_hidden_layers=1, vocab_size=50, state_size=4
    )
    model = transformers.MambaForCausalLM(config).eval()
    adapters = adapted(model, t=method)
    assert_refused(adapters, [None], "t", lambda: model(input_ids=IDS[:1]))
    with pytest.raises(AdapterStateError, match="without calling its layer"), adapters.disabled():
        model(input_ids=IDS)
