"""Every LoRA case of PEFT's tests agrees with PEFT through load, save, merge and detach, or is refused by name."""

from __future__ import annotations

import functools
import tempfile
import warnings
from pathlib import Path

import peft
import pytest
import torch
from logits import assert_same, randomise
from peft_cases import CASES, PeftCase
from tiny_models import tensors_of

import lorakit
from lorakit.errors import AdapterFileError, AdapterStateError

TIGHT = 1e-9


@functools.cache
def outcome(case: PeftCase) -> str:
    """Take the case through all steps; return the word "agrees", or the error that refuses it."""
    net, x = case.build(), case.x
    with torch.no_grad(), warnings.catch_warnings(), tempfile.TemporaryDirectory() as temporary:
        warnings.simplefilter("ignore")  # of PEFT
        folder = Path(temporary)
        base, weights = net(x), tensors_of(net)
        torch.manual_seed(0)
        single = case.build().float()  # MiCA accepts no float64
        theirs = peft.get_peft_model(single, peft.LoraConfig(**case.options)).double().eval()
        randomise([p for p in theirs.parameters() if p.requires_grad], seed=3)
        expected = theirs(x)
        theirs.save_pretrained(folder / "theirs")
        try:
            handle = lorakit.load(net, folder / "theirs")
        except AdapterFileError as error:
            return str(error)
        assert (expected - base).abs().max() > 1e-3
        assert_same(net(x), expected, TIGHT)
        handle.save(folder / "ours")
        assert_same(
            peft.PeftModel.from_pretrained(case.build(), folder / "ours").eval()(x), expected, TIGHT
        )
        lorakit.load(again := case.build(), folder / "ours")
        assert torch.equal(again(x), net(x))
        result = "agrees"
        try:
            handle.merge()
        except AdapterStateError as error:
            result = f"agrees; {error}"
        else:
            assert_same(net(x), expected, TIGHT)
            handle.unmerge()
        handle.detach()
        assert torch.equal(net(x), base)
        assert net.state_dict().keys() == weights.keys()
        assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in weights.items())
    return result


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_case_agrees_or_is_refused_by_name(case: PeftCase):
    found = outcome(case)
    if case.refused is not None:
        assert case.refused in found
    elif case.has_groups:
        assert found.startswith("agrees; ")
        assert "mixes all input channels of a grouped convolution" in found
    else:
        assert found == "agrees"


@pytest.mark.slow
def test_table_of_cases():
    """Shown by `pytest -s`."""
    results = {}
    for case in CASES:
        found = outcome(case)
        agrees, _, unmerged = found.partition("; ")
        kind = "agrees, but cannot be merged" if unmerged else "agrees"
        results[case] = kind if agrees == "agrees" else f"refused ({case.refused})"
    print()
    for case, result in results.items():
        print(f"{case.name:<60} {result}")
    refused = sum(result.startswith("refused") for result in results.values())
    print(f"{len(results) - refused} agree, {refused} are refused")
    assert refused == sum(case.refused is not None for case in CASES)
