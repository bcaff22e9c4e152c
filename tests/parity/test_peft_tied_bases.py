"""PEFT folders on a base with tied embeddings, in float64, with PEFT's own reload as the reference."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny_models
import torch
from peft_models import expected_peft_warnings
from peft_models import load as loaded_by_peft
from torch import Tensor, nn
from transformers import PreTrainedModel

import lorakit
from lorakit.errors import AdapterFileError

IDS = torch.arange(90, 102).view(2, 6)
ROUNDING = 1e-12


def tied(*, more: int = 0, seed: int = 0) -> PreTrainedModel:
    """Return a tied base in float64 with `more` rows in its vocabulary, drawn from `seed`."""
    model = tiny_models.build("llama", tie_word_embeddings=True).double()
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
        # PEFT does this by itself if it finds the base's smaller vocabulary on the hub.
        grew = adapted.config.vocab_size > tiny_models.VOCABULARY
        adapted.save_pretrained(folder, save_embedding_layers=grew or "auto")
    return logits(adapted)


def same(model: nn.Module, expected: Tensor) -> None:
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=ROUNDING)


def test_a_tied_weight_under_both_names_is_saved_for_its_own_base(tmp_path: Path) -> None:
    saved = ["embed_tokens", "lm_head"]
    expected = saved_by_peft(
        tied(), tmp_path / "theirs", equal=True, target_modules=["q_proj"], modules_to_save=saved
    )
    _both_ways(tied, expected, tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    ],
    ids=lambda options: "-".join(options["modules_to_save"]),
)
def test_a_tied_weight_that_peft_trains_as_one(options: dict[str, Any], tmp_path: Path) -> None:
    expected = saved_by_peft(tied(), tmp_path / "theirs", target_modules=["q_proj"], **options)
    _both_ways(tied, expected, tmp_path)


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"]], ids="-".join)
def test_the_rows_of_new_tokens_are_those_of_the_file(targets: list[str], tmp_path: Path) -> None:
    """The new rows of a base are random, so the file's must replace them in the embedding and in the head."""
    theirs = tied(more=6, seed=1)
    expected = saved_by_peft(theirs, tmp_path / "theirs", target_modules=targets)
    with_other_rows = partial(tied, more=6, seed=2)
    same(loaded_by_peft(with_other_rows(), tmp_path / "theirs"), expected)
    _both_ways(with_other_rows, expected, tmp_path)


@pytest.mark.slow
def test_an_untied_copy_of_the_base_for_weights_trained_apart(tmp_path: Path) -> None:
    """The fix that the error names."""
    saved = ["embed_tokens", "lm_head"]
    expected = saved_by_peft(
        tied(), tmp_path / "theirs", target_modules=["q_proj"], modules_to_save=saved
    )
    with pytest.raises(AdapterFileError, match=r"--base\.name COPY"):
        lorakit.load(tied(), tmp_path / "theirs")
    model = tied().float()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(tmp_path / "untied")

    def untied() -> nn.Module:
        model = lorakit.load_base(tmp_path / "untied").model.double()
        model.set_attn_implementation("eager")
        return model

    _both_ways(untied, expected, tmp_path)


def _both_ways(build: Callable[[], nn.Module], expected: Tensor, folder: Path) -> None:
    """Check the logits of PEFT's folder in lorakit, and of lorakit's copy of it in lorakit and in PEFT."""
    model = build()
    lorakit.load(model, folder / "theirs").save(folder / "ours")
    same(model, expected)
    again = build()
    lorakit.load(again, folder / "ours")
    same(again, expected)
    if (folder / "ours" / "adapter_config.json").exists():
        same(loaded_by_peft(build(), folder / "ours"), expected)
