"""Interleaved timing: the order of models, their ratios, and the operations of a call."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import tiny_models
import torch

import lorakit
from benchmarks.latency import in_turn, operations, ratio


def test_every_model_computes_once_in_each_step_and_in_changing_order() -> None:
    calls: list[str] = []
    models = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = in_turn(models, 20, warmup=3)
    assert {name: len(found) for name, found in times.items()} == dict.fromkeys("abc", 20)
    steps = [tuple(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(steps) == 23
    assert all(sorted(step) == ["a", "b", "c"] for step in steps)
    assert len(set(steps)) > 3
    assert gc.isenabled()


def test_a_ratio_is_that_of_the_steps() -> None:
    generator = np.random.default_rng(0)
    # The speed of the machine changes up to twentyfold between steps, but is the same for both models in a step.
    speeds = np.exp(generator.uniform(0, 3, 60))
    found = ratio(
        (1.1 * speeds * generator.normal(1, 0.01, 60)).tolist(),
        (speeds * generator.normal(1, 0.01, 60)).tolist(),
    )
    assert found.low < 1.1 < found.high
    assert 1.09 < found.low <= found.middle <= found.high < 1.11


def test_equal_times_are_a_ratio_of_one() -> None:
    found = ratio([0.2] * 5, [0.2] * 5)
    assert (found.middle, found.low, found.high) == (1, 1, 1)


@pytest.mark.parametrize("merged", [True, False])
def test_a_merged_model_runs_the_operations_of_the_base(merged: bool) -> None:
    model = tiny_models.build("llama")
    tokens = torch.arange(3, 9)[None]

    @torch.no_grad()
    def call() -> object:
        return model(input_ids=tokens)

    of_base = operations(call)
    handle = lorakit.attach(model, lorakit.LoRA(rank=2, targets="all-linear"))
    if merged:
        handle.merge()
    found = operations(call)
    assert "aten::addmm" in " ".join(of_base) or "aten::mm" in of_base
    assert (found == of_base) is merged
    assert merged or len(found) > len(of_base)
