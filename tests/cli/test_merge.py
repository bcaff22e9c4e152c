"""`lorakit merge` on decoder-only and encoder-decoder models."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

import tiny_models
import tiny_runs

import lorakit
from lorakit.cli import main


@pytest.mark.parametrize(
    ("arch", "auto"), [("llama", AutoModelForCausalLM), ("t5", AutoModelForSeq2SeqLM)]
)
def test_the_merged_model_says_what_the_adapted_one_said(arch, auto, tmp_path, capsys):
    base = tiny_runs.save_base(tmp_path / "base", arch)
    model = auto.from_pretrained(base).eval()
    adapters = lorakit.attach(model, lorakit.LoRA(rank=2, targets="attention"))
    with torch.no_grad():
        for parameter in adapters.trainable_parameters():
            parameter.normal_(std=0.3)
    adapters.save(str(tmp_path / "adapter"))
    words = ["merge", str(tmp_path / "adapter"), str(tmp_path / "merged"), "--base.name", base]
    words += ["--base.dtype", "float32"]
    assert main(words) == 0
    assert "Largest difference" in capsys.readouterr().out
    batch = tiny_models.example_batch(arch, model)
    merged = auto.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        found, expected = merged(**batch).logits, model(**batch).logits
        # One product instead of two: float32 rounding, for logits of order 10.
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
