"""PEFT folders on a base with tied embeddings, in float64, with PEFT's own reload as the reference."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import tiny_models
import torch
from peft_models import expected_peft_warnings
from torch import Tensor, nn
from transformers import PreTrainedModel

import lorakit

IDS = torch.arange(90, 102).view(2, 6)
ROUNDING = 1e-12


def tied(arch: str = "llama", *, more: int = 0, seed: int = 0) -> PreTrainedModel:
    """Return a tied base in float64 with `more` rows in its vocabulary, drawn from `seed`."""
    model = tiny_models.build(arch, tie_word_embeddings=True).double()
    if more:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model.resize_token_embeddings(model.config.vocab_size + more, mean_resizing=False)
            model.get_input_embeddings().weight.data[-more:].normal_()
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS % model.config.vocab_size).logits


def saved_by_peft(model: nn.Module, folder: Path, *, equal: bool = False, **options) -> Tensor:
    """Save a PEFT adapter with random numbers; return its logits.

    `equal` gives the copies of the tied weight the same numbers.
    """
    generator = torch.Generator().manual_seed(1)
    with expected_peft_warnings(), torch.no_grad():
        config = peft.LoraConfig(r=2, lora_alpha=3, **options)
        adapted = peft.get_peft_model(model, config).double().eval()
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter += 0.3 * noise
        copies = [p for name, p in adapted.named_parameters() if "modules_to_save" in name]
        for copy in copies if equal else ():
            copy.copy_(copies[0])
        adapted.save_pretrained(folder)
    return logits(adapted)


def same(model: nn.Module, expected: Tensor) -> None:
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=ROUNDING)


def test_a_tied_weight_under_both_names_is_saved_for_its_own_base(tmp_path: Path) -> None:
    saved = ["embed_tokens", "lm_head"]
    expected = saved_by_peft(
        tied(), tmp_path / "theirs", equal=True, target_modules=["q_proj"], modules_to_save=saved
    )
    model = tied()
    lorakit.load(model, tmp_path / "theirs").save(tmp_path / "ours")
    same(model, expected)
    again = tied()
    lorakit.load(again, tmp_path / "ours")
    same(again, expected)
