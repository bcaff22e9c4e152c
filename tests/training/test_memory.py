"""A run reports its own peak memory, without the memory that the process held before."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import tiny_runs
import torch

from lorakit.training.loop import train
from lorakit.training.memory import peak_memory, reset_peak_memory

CPU = torch.device("cpu")
BALLAST = 400 * 2**20

pytestmark = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK),
    reason="this system cannot reset its high-water mark",
)


def hold_and_free() -> int:
    """Allocate and free more memory than a tiny run needs; return the peak."""
    before = peak_memory(CPU)
    tensor = torch.ones(BALLAST // 4)
    peak = peak_memory(CPU)
    assert peak > max(before - 1, tensor.numel() * tensor.element_size())
    return peak


def test_a_reset_forgets_freed_memory() -> None:
    with_ballast = hold_and_free()
    reset_peak_memory()
    assert peak_memory(CPU) < with_ballast - 0.9 * BALLAST


@pytest.mark.slow
def test_a_second_run_does_not_report_the_peak_of_the_first(tmp_path: Path, base: str) -> None:
    with_ballast = hold_and_free()
    config = tiny_runs.config(tmp_path, base, max_steps=1)
    result = train(config)
    assert 0 < result.peak_memory < with_ballast - 0.5 * BALLAST
    held = torch.ones(BALLAST // 4)  # counts: the process holds it during the run
    second = train(tiny_runs.config(tmp_path, base, max_steps=1, output=str(tmp_path / "second")))
    assert second.peak_memory > held.numel() * held.element_size()
    again = train(dataclasses.replace(config, resume=True))
    assert again.peak_memory == result.peak_memory  # a finished run keeps its record
