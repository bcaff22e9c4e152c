"""q, k and v match the model's own split: changing the rows of one changes only that one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny_models
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorakit.models.places import Place, find_places

PRODUCTS = {torch.matmul, torch.bmm, torch.Tensor.matmul, torch.Tensor.bmm}
PRODUCTS |= {torch.Tensor.__matmul__, torch.baddbmm, torch.Tensor.baddbmm}
SOFTMAXES = {nn.functional.softmax, torch.softmax, torch.Tensor.softmax}


class AttentionOperands(TorchFunctionMode):
    """Records the operands of each attention module: ``{"q": .., "k": .., "v": ..}``.

    Eager attention multiplies q with k, takes the softmax, and multiplies that with v, so these
    operands are q, k and v after the model's own split.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[nn.Module, dict[str, torch.Tensor]] = {}
        self.inside: nn.Module | None = None
        self.after_softmax = False

    def enter(self, module: nn.Module, *_: Any) -> None:
        self.inside, self.after_softmax = module, False
        self.seen[module] = {}

    def leave(self, *_: Any) -> None:
        self.inside = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.inside is not None and func in SOFTMAXES:
            self.after_softmax = True
        elif self.inside is not None and func in PRODUCTS:
            factors = (kwargs["batch1"], kwargs["batch2"]) if "batch1" in kwargs else args
            left, right = factors
            if right.ndim == 2:  # Falcon's linear layers are matrix products
                return func(*args, **kwargs)
            recorded = self.seen[self.inside]
            if self.after_softmax:
                recorded.setdefault("v", right.detach().clone())
            else:
                recorded.setdefault("q", left.detach().clone())
                recorded.setdefault("k", right.detach().clone())
        return func(*args, **kwargs)


def operands(arch: str, model: PreTrainedModel, attentions: dict[str, nn.Module]) -> Any:
    recorder = AttentionOperands()
    handles = []
    for module in attentions.values():
        handles.append(module.register_forward_pre_hook(recorder.enter))
        handles.append(module.register_forward_hook(recorder.leave))
    try:
        with torch.no_grad(), recorder:
            model(**tiny_models.example_batch(arch, model, padding=0))
    finally:
        for handle in handles:
            handle.remove()
    return {path: recorder.seen[module] for path, module in attentions.items()}


@contextmanager
def noise_on(model: nn.Module, place: Place) -> Iterator[None]:
    """Add noise to the weight rows of a place, and remove it again."""
    layer = model.get_submodule(place.path)
    assert isinstance(layer, (nn.Linear, Conv1D))
    before = layer.weight.detach().clone()
    weight = layer.weight.data.T if isinstance(layer, Conv1D) else layer.weight.data
    rows = torch.arange(len(weight)) if place.slice is None else place.slice.rows()
    weight[rows] += torch.randn(len(rows), weight.shape[1])
    try:
        yield
    finally:
        layer.weight.data.copy_(before)


@pytest.mark.parametrize("arch", tiny_models.EVERY_MODEL)
def test_noise_on_one_projection_changes_only_that_projection(arch: str) -> None:
    model = tiny_models.build(arch)
    places = find_places(model, "attention.qkv")
    attentions = {
        place.path: model.get_submodule(place.path.rpartition(".")[0]) for place in places
    }
    plain = operands(arch, model, attentions)
    for place in places:
        torch.manual_seed(0)
        with noise_on(model, place):
            noisy = operands(arch, model, attentions)[place.path]
        assert noisy.keys() == {"q", "k", "v"}
        changed = {
            name: (noisy[name] != plain[place.path][name]).float().mean().item() for name in "qkv"
        }
        target = place.role.removeprefix("attention.")
        # Every row changes. Rotation may round a single value back.
        assert changed.pop(target) > 0.99, place
        assert set(changed.values()) == {0.0}, place


@pytest.mark.parametrize("arch", ["phi3", "Glm", "ModernBert"])
def test_gate_is_the_input_of_the_activation(arch: str) -> None:
    model = tiny_models.build(arch)
    activation = next(
        module.activation_fn if hasattr(module, "activation_fn") else module.act
        for path, module in model.named_modules()
        if path.endswith("mlp")
    )
    seen: list[torch.Tensor] = []
    activation.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))

    def gate_input() -> torch.Tensor:
        seen.clear()
        with torch.no_grad():
            model(**tiny_models.example_batch(arch, model))
        return seen[0]

    plain = gate_input()
    with noise_on(model, find_places(model, "mlp.up")[0]):
        assert torch.equal(gate_input(), plain)
    with noise_on(model, find_places(model, "mlp.gate")[0]):
        assert (gate_input() != plain).all()


def test_multihead_attention_slices_are_q_k_and_v(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same check for torch's own module; the operands are those of its two ``torch.bmm`` calls."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    model = nn.ModuleDict({"attention": attention})
    inputs = torch.randn(3, 2, 5, 8).unbind()
    products: list[tuple[torch.Tensor, torch.Tensor]] = []
    multiply = torch.bmm

    def recording(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        products.append((left.detach().clone(), right.detach().clone()))
        return multiply(left, right)

    def seen() -> dict[str, torch.Tensor]:
        products.clear()
        attention(*inputs)
        (q, k), (_, v) = products
        return {"q": q, "k": k, "v": v}

    monkeypatch.setattr(torch, "bmm", recording)
    plain = seen()
    for place in find_places(model, "attention.qkv"):
        assert place.slice is not None
        before = attention.in_proj_weight.detach().clone()
        attention.in_proj_weight.data[place.slice.rows()] += torch.randn(8, 8)
        noisy = seen()
        attention.in_proj_weight.data.copy_(before)
        changed = {name: (noisy[name] != plain[name]).float().mean().item() for name in "qkv"}
        assert changed == {"q": 0.0, "k": 0.0, "v": 0.0} | {place.role[-1]: 1.0}
