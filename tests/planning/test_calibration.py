"""Machine constants are fitted to two runs."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections import Counter

import pytest
import torch

from lorakit.errors import ConfigurationError
from lorakit.models.processor import threads
from lorakit.planning import machine
from lorakit.planning.calibration import MARGIN, MOST, _run_trial, calibrate, fit
from lorakit.planning.ledger import Work
from lorakit.planning.machine import (
    KERNEL,
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
    call=1e-5,
    slack=0.2,
    packed=0.5,
    origin="true",
)
CPU = torch.device("cpu")


def step(products: float, traffic: float, tensors: int) -> Step:
    peak = {"activations": tensors, "gradients": 0, "logits": 0, "temporary": 0}
    work = Work(
        Counter({Product("mm", (), products / 10, 1000): 10}), traffic, drawn=1e6, calls=3000
    )
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


STEPS = [step(3e10, 9e8, 5_000_000), step(1.3e11, 2e9, 20_000_000)]


def test_the_true_constants_are_fitted():
    start = dataclasses.replace(TRUE, traffic=1e10, slack=0.9)
    fitted = fit(start, STEPS, runs(STEPS), {})
    assert fitted.traffic == pytest.approx(TRUE.traffic)
    assert fitted.slack == pytest.approx(MARGIN * TRUE.slack)
    assert "calibrated" in fitted.origin


def test_memory_passes_account_for_the_time_beyond_products():
    """The measured products take three times as long as their rate predicts."""
    timings = {p: 3 * TRUE.estimate(p) for s in STEPS for p in s.work.products}
    measured = runs(STEPS)
    for run, s in zip(measured, STEPS, strict=True):
        run["seconds"] = TRUE.seconds(s.work, timings)
    start = dataclasses.replace(TRUE, traffic=1e10)
    fitted = fit(start, STEPS, measured, timings)
    assert fitted.traffic == pytest.approx(TRUE.traffic)
    for s, run in zip(STEPS, measured, strict=True):
        assert fitted.seconds(s.work, timings) == pytest.approx(run["seconds"])


@pytest.mark.parametrize(("seconds", "factor"), [(1e-3, MOST), (1e3, 1 / MOST)])
def test_the_fitted_rate_is_bounded_on_a_busy_machine(seconds, factor):
    """The runs are faster than their products alone, or take a quarter of an hour."""
    measured = [run | {"seconds": seconds} for run in runs(STEPS)]
    fitted = fit(TRUE, STEPS, measured, {})
    assert fitted.traffic == pytest.approx(factor * TRUE.traffic)


def test_a_calibration_is_cached_and_used(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path))
    assert read_calibration(CPU, torch.float32) is None
    path = keep_calibration(TRUE, CPU, torch.float32)
    assert path == calibration_file(CPU, torch.float32)
    assert find_machine(CPU, torch.float32, here=True) == TRUE
    assert read_calibration(CPU, torch.bfloat16) is None  # each dtype has its own
    path.write_text(path.read_text().replace("400000000000.0", "500000000000.0"))
    assert read_calibration(CPU, torch.float32) is None  # damaged: ignored


def test_a_trial_reports_its_own_memory():
    """getrusage in a child process includes the memory of its parent."""
    held = torch.ones(2**28)
    shape = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = {"model_type": "llama", **shape, "num_attention_heads": 4}
    figures = _run_trial(
        {"config": config, "dtype": "float32", "count": 1, "length": 8, "targets": 4}
    )
    assert 0 < figures["ready"] < figures["peak"] < figures["ready"] + held.nbytes // 4
    assert figures["seconds"] > 0


def test_a_trial_has_the_threads_of_the_plan(monkeypatch):
    sent = []

    def run(command, *, input, **_):
        sent.append(json.loads(input))
        return subprocess.CompletedProcess(command, 0, stdout="{}", stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    with threads(3):
        _run_trial({"count": 1})
    assert sent == [{"count": 1, "threads": 3}]


@pytest.mark.slow
@pytest.mark.parametrize("by_onednn", [False, True])
def test_kernels_are_cached_in_16_bits_and_by_onednn(monkeypatch, by_onednn):
    monkeypatch.setattr(machine, "SECONDS", 0.01)
    monkeypatch.setattr(machine, "onednn_is_faster", lambda: by_onednn)
    assert (machine.measure(CPU, torch.float32).kernel > 0) == by_onednn
    assert KERNEL <= machine.measure(CPU, torch.bfloat16).kernel < 20 * KERNEL


def test_a_gpu_is_not_calibrated():
    with pytest.raises(ConfigurationError, match="for the CPU"):
        calibrate(torch.device("cuda"), torch.bfloat16)
