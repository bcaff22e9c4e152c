"""Constants of a machine, from what two runs took."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from transformers import LlamaConfig

from lorakit.errors import ConfigurationError
from lorakit.planning.calibration import MARGIN, _try, calibrate, fit
from lorakit.planning.ledger import Work
from lorakit.planning.machine import (
    Machine,
    calibration_file,
    find_machine,
    keep_calibration,
    read_calibration,
)
from lorakit.planning.products import Product
from lorakit.planning.step import Step

TRUE = Machine(
    products=4e11,
    traffic=2e10,
    draws=1e9,
    slower=1.3,
    call=1e-5,
    slack=0.2,
    packed=0.5,
    origin="true",
)
CPU = torch.device("cpu")


def step(products: float, traffic: float, tensors: int) -> Step:
    peak = {"activations": tensors, "gradients": 0, "logits": 0, "temporary": 0}
    work = Work(Counter({Product("mm", (), products / 10, 0): 10}), traffic, drawn=1e6, calls=3000)
    return Step(peak, work, widest=1000)  # type: ignore[arg-type]


def runs(steps: list[Step]) -> list[dict[str, float]]:
    return [
        {
            "ready": 100.0,
            "peak": 100.0 + sum(s.peak.values()) * (1 + TRUE.slack) + 0.5 * s.widest,
            "seconds": TRUE.seconds(s.work),
        }
        for s in steps
    ]


def test_the_true_constants_are_found():
    steps = [step(3e10, 9e8, 5_000_000), step(1.3e11, 2e9, 20_000_000)]
    start = dataclasses.replace(TRUE, slower=1.0, traffic=1e9, slack=0.9)
    found = fit(start, steps, runs(steps), {})
    assert found.slower == pytest.approx(TRUE.slower)
    assert found.traffic == pytest.approx(TRUE.traffic)
    assert found.slack == pytest.approx(MARGIN * TRUE.slack)
    assert "calibrated" in found.origin


def test_products_are_fitted_to_what_they_take_on_their_own():
    steps = [step(3e10, 9e8, 5_000_000), step(1.3e11, 2e9, 20_000_000)]
    tried = {p: 2 * p.operations / TRUE.products for s in steps for p in s.work.products}
    found = fit(TRUE, steps, runs(steps), tried)
    assert found.slower == pytest.approx(TRUE.slower / 2)
    for s, run in zip(steps, runs(steps), strict=True):
        assert found.seconds(s.work, tried) == pytest.approx(run["seconds"])


def test_runs_that_do_not_tell_the_rates_apart_scale_them():
    steps = [step(3e10, 9e8, 5_000_000), step(6e10, 1.8e9, 20_000_000)]
    measured = runs(steps)
    for run in measured:
        run["seconds"] *= 2
    measured[1]["seconds"] *= 1.3  # no rates explain both
    found = fit(TRUE, steps, measured, {})
    total = sum(found.seconds(s.work) for s in steps)
    assert total == pytest.approx(sum(run["seconds"] for run in measured))


def test_a_calibration_is_kept_and_used(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path))
    assert read_calibration(CPU, torch.float32) is None
    path = keep_calibration(TRUE, CPU, torch.float32)
    assert path == calibration_file(CPU, torch.float32)
    assert find_machine(CPU, torch.float32, here=True) == TRUE
    assert read_calibration(CPU, torch.bfloat16) is None  # another dtype is another machine
    path.write_text(path.read_text().replace("400000000000.0", "500000000000.0"))
    assert read_calibration(CPU, torch.float32) is None  # damaged: measured anew


def test_a_trial_reports_its_own_memory():
    """What its parent holds counts for a child in the usage of resources that the system reports."""
    held = torch.ones(2**28)
    shape = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(**shape, num_attention_heads=4)
    figures = _try(config, torch.float32, {"count": 1, "length": 8, "targets": 4})
    assert 0 < figures["ready"] < figures["peak"] < figures["ready"] + held.nbytes // 4
    assert figures["seconds"] > 0


def test_a_gpu_is_not_calibrated():
    with pytest.raises(ConfigurationError, match="for the CPU"):
        calibrate(torch.device("cuda"), torch.bfloat16)
