"""Norms with a trained float32 bias and a frozen bfloat16 weight."""

import dataclasses
from pathlib import Path

import tiny_runs
import torch
import torch.nn.functional as F
from torch import nn

from lorakit.models import dtype_choice
from lorakit.models.base_config import BaseConfig
from lorakit.models.dtype_choice import resolve_dtype
from lorakit.training.loop import train
from lorakit.training.mixed_precision import cast_mixed_norms
from lorakit.training.setup import prepare


def test_a_norm_computes_with_both_in_float32_and_keeps_its_own():
    norm = nn.LayerNorm(8).to(torch.bfloat16)
    nn.init.uniform_(norm.weight)
    norm.weight.requires_grad_(False)
    weight, bias = norm.weight, nn.Parameter(torch.randn(8))
    norm.bias = bias
    cast_mixed_norms(norm)
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    expected = F.layer_norm(x.float(), (8,), weight.float(), bias)
    torch.testing.assert_close(norm(x).float(), expected, atol=2e-2, rtol=2e-2)
    norm(x).sum().backward()
    assert bias.grad is not None
    torch.testing.assert_close(bias.grad, torch.full((8,), 3.0))
    assert norm.weight is weight
    assert weight.dtype == torch.bfloat16


def test_bitfit_trains_on_a_base_in_bfloat16(tmp_path):
    base = tiny_runs.save_base(tmp_path / "base", "bert")
    data = tiny_runs.write_rows(tmp_path / "labels.jsonl", tiny_runs.labelled(24))
    config = tiny_runs.config(
        tmp_path,
        base,
        base=BaseConfig(name=base, dtype="bfloat16", device="cpu"),
        data=tiny_runs.DataConfig(train=data, validation=data),
        method="bitfit",
        max_steps=3,
    )
    result = train(config)
    assert result.scores["loss"] != result.scores_before["loss"]


def test_auto_is_what_the_chosen_device_multiplies(tmp_path, monkeypatch):
    monkeypatch.setattr(
        dtype_choice, "multiplies_bfloat16", lambda device: device != torch.device("cpu")
    )
    base = tiny_runs.save_base(tmp_path / "base")
    config = tiny_runs.config(tmp_path, base, base=BaseConfig(name=base, device="cpu"), max_steps=1)
    resolved, _ = resolve_dtype(config.base)
    job = prepare(dataclasses.replace(config, base=resolved))
    assert job.model.dtype == job.dtype == torch.float32
    assert train(config)
    assert "dtype: float32" in (Path(config.output) / "config.yaml").read_text()
