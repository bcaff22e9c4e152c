"""PEFT and lorakit compute the same logits from the same file, for every architecture and pair of options."""

from __future__ import annotations

import covering_array
import peft_models
import pytest
import torch
from covering_array import Case
from logits import assert_differ, assert_same, randomise

from lorakit import attach, load

FEW = covering_array.few_cases()
CASES = [
    case if case in FEW else pytest.param(case, marks=pytest.mark.slow)
    for case in covering_array.cases()
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


@every_case
@torch.no_grad()
def test_lorakit_reads_what_peft_wrote(case: Case, tmp_path):
    model = case.model()
    batch = case.batch(model)
    base = model(**batch).logits
    adapted = peft_models.adapt(case.model(), peft_models.configuration(case))
    expected = adapted(**batch).logits
    assert_differ(expected, base)

    handle = load(model, peft_models.save(adapted, tmp_path / "adapter"))
    assert_same(model(**batch).logits, expected)
    handle.detach()
    assert torch.equal(model(**batch).logits, base)


@every_case
@torch.no_grad()
def test_peft_reads_what_lorakit_wrote(case: Case, tmp_path):
    model = case.model()
    batch = case.batch(model)
    base = model(**batch).logits
    handle = attach(model, case.method(), seed=1)
    randomise(handle.trainable_parameters(), seed=2)
    ours = model(**batch).logits
    assert_differ(ours, base)

    folder = handle.save(tmp_path / "adapter")
    adapted = peft_models.load(case.model(), folder)
    assert_same(adapted(**batch).logits, ours)
    again = case.model()
    load(again, folder)
    assert torch.equal(again(**batch).logits, ours)
