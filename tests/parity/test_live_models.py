"""Adapters pass between libraries by `transformers`' load_adapter and by `lorakit.from_peft`."""

from __future__ import annotations

from pathlib import Path

import covering_array
import peft
import peft_models
import pytest
import tiny_models
import torch
from covering_array import Case, fresh_model
from logits import assert_differ, assert_same, randomise

from lorakit import LoRA, attach, from_peft, load

FOLDERS = {
    "llama": LoRA(rank=2, alpha=3.0, targets="all-linear", rank_pattern={"down_proj": 3}),
    "gpt2": LoRA(rank=2, alpha=3.0, targets="attention.qv", init="pissa"),
    "roberta": LoRA(rank=2, alpha=3.0, bias="lora_only", train_modules="classifier"),
}
"""Without DoRA: transformers 5.24 loses its magnitudes, also from PEFT's own folders."""


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("arch", FOLDERS)
def test_transformers_load_adapter_loads_our_folder(arch: str, tmp_path: Path):
    head = tiny_models.natural_head(arch)
    model, theirs = fresh_model(arch, head), fresh_model(arch, head)
    batch = tiny_models.example_batch(arch, model)
    base = model(**batch).logits
    handle = attach(model, FOLDERS[arch], seed=1)
    randomise(handle.trainable_parameters(), seed=2)
    expected = model(**batch).logits
    assert_differ(expected, base)
    folder = handle.save(tmp_path / "adapter")
    with peft_models.expected_peft_warnings():
        theirs.load_adapter(str(folder))
    assert_same(theirs.eval()(**batch).logits, expected)


EVERY_TENTH = covering_array.cases()[::10]


@pytest.mark.parametrize("case", EVERY_TENTH, ids=str)
def test_from_peft_converts_a_live_model(case: Case):
    model = case.model()
    batch = case.batch(model)
    base, keys = model(**batch).logits, list(model.state_dict())
    adapted = peft_models.adapt(case.model(), peft_models.configuration(case))
    expected = adapted(**batch).logits
    assert_differ(expected, base)
    with peft_models.expected_peft_warnings():
        handle = from_peft(adapted)
    converted = handle.model
    assert type(converted) is type(model)
    assert_same(converted(**batch).logits, expected)
    assert [key for key in converted.state_dict() if ".adapters." not in key] == keys
    handle.detach()
    if case.bias == "none":  # PEFT trains biases in place and loses the original ones
        assert torch.equal(converted(**batch).logits, base)


@pytest.mark.parametrize("arch", ["gemma", "smollm3"])
def test_tied_adapters_of_peft(arch: str, tmp_path):
    """PEFT's ensure_weight_tying uses one pair of factors for the table and the tied head."""
    model = fresh_model(arch, "causal-lm")
    batch = tiny_models.example_batch(arch, model)
    base = model(**batch).logits
    config = peft.LoraConfig(
        r=2, lora_alpha=3.0, target_modules=["embed_tokens"], ensure_weight_tying=True
    )
    adapted = peft_models.adapt(fresh_model(arch, "causal-lm"), config)
    expected = adapted(**batch).logits
    assert_differ(expected, base)
    with peft_models.expected_peft_warnings():
        adapted.save_pretrained(tmp_path / "adapter")
    load(model, tmp_path / "adapter")
    assert_same(model(**batch).logits, expected)
    with peft_models.expected_peft_warnings():
        handle = from_peft(adapted)
    assert_same(handle.model(**batch).logits, expected)
