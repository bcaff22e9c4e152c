"""A run reports its own peak memory, without the memory that the process held before."""

from __future__ import annotations

import ctypes
import dataclasses
import os
from pathlib import Path

import pytest
import tiny_runs
import torch

from lorakit.compute.memory import free_memory
from lorakit.training.loop import train
from lorakit.training.memory import peak_memory, reset_peak_memory, trim_heap

CPU = torch.device("cpu")
BALLAST = 400 * 2**20

can_reset = pytest.mark.skipif(
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


@can_reset
def test_a_reset_forgets_freed_memory() -> None:
    with_ballast = hold_and_free()
    reset_peak_memory()
    assert peak_memory(CPU) < with_ballast - 0.9 * BALLAST


@can_reset
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


@pytest.mark.parametrize("error", [TypeError, AttributeError])  # Windows, macOS
def test_systems_without_glibc_release_nothing(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def without_glibc(name: None) -> None:
        raise error

    monkeypatch.setattr(ctypes, "CDLL", without_glibc)
    trim_heap()


def test_an_accelerator_other_than_cuda_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """For its peak, to reset it, and to return cached memory."""
    calls = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    monkeypatch.setattr(torch.xpu, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 2)
    monkeypatch.setattr(torch.xpu, "reset_peak_memory_stats", calls.append)
    monkeypatch.setattr(torch.xpu, "empty_cache", lambda: calls.append("empty"))
    monkeypatch.setattr(torch.xpu, "max_memory_allocated", {torch.device("xpu:1"): 123}.get)
    reset_peak_memory()
    free_memory()
    assert calls == [0, 1, "empty"]
    assert peak_memory(torch.device("xpu:1")) == 123
