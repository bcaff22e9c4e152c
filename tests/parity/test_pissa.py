"""PiSSA without a change of the base, compared with its formula in float64 and with PEFT."""

from __future__ import annotations

from pathlib import Path

import arithmetic
import peft
import peft_models
import pytest
import tiny_models
import torch
from arithmetic import TIGHT, float64_model, inputs
from covering_array import fresh_model
from logits import assert_differ, assert_same, randomise
from tiny_models import tensors_of
from torch import nn

from lorakit import LoRA, attach, load
from lorakit.errors import AdapterFileError

RANK, ALPHA = 2, 3.0
SCALING = ALPHA / RANK
EXACT = 1e-12
"""Tolerance if everything computes in float64."""


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize(
    ("arch", "role"),
    [("llama", "attention"), ("gpt2", "mlp"), ("gemma", "embedding"), ("vit", "embedding")],
    ids=lambda value: value,
)
def test_pissa_starts_as_the_base_and_trains_its_principal_part(arch: str, role: str):
    model, oracle = float64_model(arch), float64_model(arch)
    batch = inputs(arch, model)
    base, state = model(**batch).logits, tensors_of(model)
    method = LoRA(rank=RANK, alpha=ALPHA, targets=role, init="pissa")
    handle = attach(model, method, dtype=torch.float64)
    assert_same(model(**batch).logits, base, TIGHT)
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in state.items())
    for path, module in handle.modules().items():
        principal = arithmetic.principal(arithmetic.matrix_of(oracle.get_submodule(path)), RANK)
        A, B = module.lora_A.flatten(1), module.lora_B.flatten(1)
        assert_same(SCALING * B @ A, principal, EXACT)

    randomise(handle.trainable_parameters(), seed=2)
    for path, module in handle.modules().items():
        layer = oracle.get_submodule(path)
        W = arithmetic.matrix_of(layer)
        A, B = module.lora_A.flatten(1), module.lora_B.flatten(1)
        W = W - arithmetic.principal(W, RANK) + arithmetic.low_rank(A, B, SCALING, len(W))
        arithmetic.set_matrix(layer, W)
        if arch == "gemma":  # the adapter of the table does not apply to the tied head
            oracle.lm_head.weight = nn.Parameter(state["lm_head.weight"])
    assert_differ(model(**batch).logits, base)
    assert_same(model(**batch).logits, oracle(**batch).logits, TIGHT)


def peft_pissa(model: nn.Module) -> peft.PeftModel:
    targets = ["q_proj", "v_proj"]
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=targets, init_lora_weights="pissa"
    )
    with peft_models.expected_peft_warnings():
        return peft.get_peft_model(model, config).eval()


def test_pissa_computes_the_same_as_pefts():
    """The same A and B, with PEFT's changed base and with our unchanged one."""
    model = fresh_model("llama", "causal-lm")
    batch = tiny_models.example_batch("llama", model)
    base = model(**batch).logits
    theirs = peft_pissa(fresh_model("llama", "causal-lm"))
    method = LoRA(rank=RANK, alpha=ALPHA, targets=("q_proj", "v_proj"), init="pissa")
    handle = attach(model, method)
    randomise((p for p in theirs.parameters() if p.requires_grad), seed=2)
    for path, module in handle.modules().items():
        layer = theirs.base_model.model.get_submodule(path)
        module.lora_A.copy_(layer.lora_A["default"].weight)
        module.lora_B.copy_(layer.lora_B["default"].weight)
    assert_differ(model(**batch).logits, base)
    assert_same(model(**batch).logits, theirs(**batch).logits)


def test_pissa_of_peft_is_loaded_after_conversion(tmp_path: Path):
    """The unconverted file does not identify its base, so loading it is an error that names the conversion."""
    model = fresh_model("llama", "causal-lm")
    batch = tiny_models.example_batch("llama", model)
    start, theirs = (peft_pissa(fresh_model("llama", "causal-lm")) for _ in range(2))
    start.peft_config["default"].init_lora_weights = True  # as PEFT's conversion guide does
    start.save_pretrained(tmp_path / "start")
    randomise((p for p in theirs.parameters() if p.requires_grad), seed=2)
    expected = theirs(**batch).logits
    theirs.save_pretrained(tmp_path / "raw")
    with pytest.raises(AdapterFileError, match="path_initial_model_for_weight_conversion"):
        load(model, tmp_path / "raw")
    with (
        peft_models.expected_peft_warnings(),
        pytest.warns(UserWarning, match="PiSSA changes the base"),
    ):
        theirs.save_pretrained(
            tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start")
        )
    load(model, tmp_path / "converted")
    assert_same(model(**batch).logits, expected)
