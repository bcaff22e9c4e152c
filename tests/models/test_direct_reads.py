"""Layers whose weight the classes of other packages than transformers read without calling them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit.errors import TargetError
from lorakit.models.direct_reads import never_calls
from lorakit.models.roles import resolve_targets


def of_timm(kind: type[nn.Module]) -> type[nn.Module]:
    kind.__module__ = "timm.models.eva"
    return kind


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(4, 4)
        self.called = nn.Linear(4, 4)


class Users(TwoLayers):
    """May call a layer in any way, for example through a computed name."""

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, "re" + "ad")(self.called(x)) * self.read.weight.sum()


@of_timm
class Reads(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        return self.called(F.linear(x, self.read.weight, self.read.bias))


@of_timm
class Attention(nn.Module):
    """Calls `qkv` or reads its weight, as in EVA and BEiT of timm."""

    def __init__(self, bias: bool, separate: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 4, bias=False)
        self.bias = nn.Parameter(torch.zeros(4)) if bias else None
        self.separate = separate

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return self.qkv(x)
        return self.qkv(x) + self.bias if self.separate else F.linear(x, self.qkv.weight, self.bias)


@of_timm
class Fusing(nn.Sequential):
    def __init__(self) -> None:
        super().__init__()
        self.add_module("fc", nn.Linear(4, 4))

    def fuse(self) -> Tensor:
        return self.fc.weight.sum(0)


@of_timm
class Stepwise(nn.Module):
    """Calls its layer by index, and reads the weight when it is reset."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.fc.weight)

    def forward(self, x: Tensor) -> Tensor:
        return next(self.children())(x)


@of_timm
class Kernel(nn.Module):
    """Tests the class of the layer, as wav2vec 2 does, and reads its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self.fc, nn.Linear):
            raise TypeError
        return F.linear(x, self.fc.weight)


def test_a_layer_that_its_class_only_reads_is_no_target() -> None:
    model = Reads()
    assert [place.path for place in resolve_targets(model, "all-linear")] == ["called"]
    with pytest.raises(TargetError, match="'read', which Reads never calls"):
        resolve_targets(model, "read")


def test_classes_of_the_user_are_not_judged() -> None:
    assert [place.path for place in resolve_targets(Users(), "all-linear")] == ["read", "called"]


@pytest.mark.parametrize(
    ("parent", "name"),
    [
        (Attention(bias=False, separate=False), "qkv"),
        (Attention(bias=True, separate=True), "qkv"),
        (Attention(bias=True, separate=False), "qkv"),
        (Fusing(), "fc"),
        (Stepwise(), "fc"),
        (Kernel(), "fc"),
    ],
    ids=["no bias", "separate bias", "fused bias", "Sequential", "reset", "isinstance"],
)
def test_a_layer_is_read_where_no_call_of_it_runs(parent: nn.Module, name: str) -> None:
    calls: list[nn.Module] = []
    layer = parent.get_submodule(name)
    layer.register_forward_hook(lambda module, *_: calls.append(module))
    parent(torch.zeros(1, 4))
    assert never_calls(parent, name) == (not calls)


def test_layers_that_diffusers_has_fused_are_never_called() -> None:
    attention = nn.Module()
    for name in ("to_q", "to_k", "to_v"):
        attention.add_module(name, nn.Linear(4, 4))
    model = nn.ModuleDict({"attention": attention})
    attention.fused_projections = False
    resolve_targets(model, ("to_q", "to_k"))
    attention.to_kv = nn.Linear(4, 8)
    attention.fused_projections = True
    resolve_targets(model, ("to_q", "to_kv"))  # of a cross-attention
    with pytest.raises(TargetError, match="never calls"):
        resolve_targets(model, "to_k")
