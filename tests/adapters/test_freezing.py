"""The first adapter freezes the base; later ones leave what the user has unfrozen since."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from lorakit.adapters import attach, load
from lorakit.methods import BitFit, LoRA, Method


def flags(model: nn.Module) -> dict[str, bool]:
    return {n: p.requires_grad for n, p in model.named_parameters() if ".adapters." not in n}


@pytest.mark.parametrize("second", [LoRA(rank=2, targets="0"), BitFit()], ids=["lora", "bitfit"])
def test_a_second_adapter_leaves_what_the_user_unfroze(second: Method) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight.requires_grad_(False)
    before = flags(model)
    attach(model, LoRA(rank=2, targets="0"), name="first")
    assert not any(flags(model).values())

    weight = model[1].weight.requires_grad_(True)
    adapters = attach(model, second, name="second")
    assert weight.requires_grad
    assert not model[0].weight.requires_grad
    adapters.activate(None)
    assert [name for name, flag in flags(model).items() if flag] == ["1.weight"]

    adapters.detach()
    assert flags(model) == before
    attach(model, second)  # a first adapter again
    assert not weight.requires_grad


def test_a_loaded_adapter_leaves_what_the_user_unfroze(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    attach(model, LoRA(rank=2, targets="0"), name="first").save(tmp_path / "first")
    weight = model[1].weight.requires_grad_(True)
    load(model, tmp_path / "first", name="second")
    assert weight.requires_grad


def test_detach_leaves_what_was_added_after_attach() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    adapters = attach(model, LoRA(rank=2, targets="0"))
    model.append(nn.Linear(4, 2))
    adapters.detach()
    assert all(parameter.requires_grad for parameter in model.parameters())
