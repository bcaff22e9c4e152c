"""Random numbers in training depend on the seed, the step, the process and the batch alone."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from torch import Tensor

from lorakit.methods.lora.method import LoRA
from lorakit.training import step as steps
from lorakit.training.job import Job
from lorakit.training.loop import train
from lorakit.training.setup import prepare

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"attention_dropout": 0.1},
    "gpt2": {},
    "t5": {},
    "bart": {"attention_dropout": 0.1, "encoder_layerdrop": 0.3},
}


def job_of(folder: Path, arch: str, **settings: Any) -> Job:
    """Return a job in float64, whose adapter is not zero."""
    base = tiny_runs.save_base(folder / arch, arch, **MODELS[arch])
    lora = LoRA(dropout=0.1, targets=("all-linear",))
    job = prepare(tiny_runs.config(folder, base, lora=lora, **settings))
    job.model.double()
    generator = torch.Generator().manual_seed(1)
    for parameter in job.parameters.values():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.data.add_(0.02 * noise)
    return job


def gradient(job: Job, step: int = 3) -> Tensor:
    """Return the gradient of 12 examples, in three batches of different masks."""
    for parameter in job.parameters.values():
        parameter.grad = None
    batches = [job.collate(job.train[at : at + 4]) for at in range(0, 12, 4)]
    steps._accumulate_gradients(job, batches, 7, step, lambda: None)
    # A block that BART skips has none.
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in job.parameters.values()]
    return torch.cat([g.flatten() for g in gradients])


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("arch", MODELS)
def test_seed_step_and_process_decide(tmp_path: Path, arch: str) -> None:
    job = job_of(tmp_path, arch)
    expected = gradient(job)
    torch.rand(5)  # the state before does not count
    assert torch.equal(gradient(job), expected)
    assert distance(gradient(job, step=4), expected) > 0.05
    job.processes, alone = dataclasses.replace(job.processes, rank=1), job.processes
    assert distance(gradient(job), expected) > 0.05
    job.processes, job.config = alone, dataclasses.replace(job.config, seed=1)
    assert distance(gradient(job), expected) > 0.05


def test_equal_batches_of_a_step_have_different_masks(tmp_path: Path) -> None:
    job = job_of(tmp_path, "llama")
    batch = job.collate(job.train[:4])
    first, both = (
        steps._accumulate_gradients(job, [batch] * count, 7, 3, lambda: None)[0] for count in (1, 2)
    )
    assert both - first != pytest.approx(first, rel=1e-6)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_recomputed_blocks_draw_the_same_masks(tmp_path: Path, arch: str) -> None:
    """Gradient checkpointing restores the generators' states."""
    usual = job_of(tmp_path, arch)
    usual.objective.last_block = None  # type: ignore[union-attr]  # checkpointed blocks are computed whole
    recomputed = job_of(tmp_path, arch, gradient_checkpointing=True)
    assert distance(gradient(recomputed), gradient(usual)) < 1e-12


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_leaves_the_global_generators(tmp_path, base, monkeypatch, fails: bool) -> None:
    """A loop that draws settings for several runs would draw the same ones for each."""
    before = tiny_runs.random_states()
    if fails:
        tiny_runs.crash_in_step(monkeypatch, 2)
    with pytest.raises(tiny_runs.Crash) if fails else nullcontext():
        train(tiny_runs.config(tmp_path, base, max_steps=2))
    assert tiny_runs.random_states() == before


@pytest.mark.slow
def test_the_import_of_train_leaves_the_generator_of_python() -> None:
    """A user's seed before the first run gives the same numbers after it as before later runs."""
    code = "import random, lorakit; s = random.getstate(); lorakit.train; assert random.getstate() == s"
    subprocess.run([sys.executable, "-c", code], check=True)
