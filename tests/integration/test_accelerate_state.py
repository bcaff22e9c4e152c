"""Accelerate's `save_state` and `load_state` restore the adapter and leave the base unchanged."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
from accelerate import Accelerator
from random_adapters import randomise
from tiny_models import logits

from lorakit import FullFineTuning, LoRA, attach
from lorakit.methods.method import Method

CASES: dict[str, tuple[str, Method]] = {
    "lora": ("llama", LoRA(rank=2, targets="all-linear")),
    "trained head": ("llama", LoRA(rank=2, train_modules="lm_head")),
    "biases, tied table": ("gpt2", LoRA(rank=2, bias="all", train_modules="wte")),
    "full, tied": ("gpt2", FullFineTuning()),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("active", [True, False], ids=["active", "inactive"])
def test_state_round_trip(case: str, active: bool, tmp_path: Path) -> None:
    arch, method = CASES[case]
    model = tiny_models.build(arch)
    base = logits(model)
    adapters = attach(model, method)
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(adapters.trainable_parameters(), lr=1e-2)
    accelerator.prepare(model, optimizer)
    randomise(adapters)
    expected = logits(model)
    adapters.activate("default" if active else None)
    accelerator.save_state(str(tmp_path / "state"))

    adapters.activate("default")
    randomise(adapters, seed=1)
    assert (logits(model) - expected).abs().max() > 1e-2
    adapters.activate("default" if active else None)
    accelerator.load_state(str(tmp_path / "state"))
    adapters.activate("default")
    assert torch.equal(logits(model), expected)
    adapters.activate(None)
    assert torch.equal(logits(model), base)
    adapters.detach()
    assert torch.equal(logits(model), base)
