"""Latency ratios of models from interleaved forward passes.

In every step each model runs the same forward pass, in a new random order, so that a slow moment of the machine
affects all models alike. The ratio of two models is the median of their ratios per step. Its interval is a
bootstrap over the steps.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import bootstrap
from torch.profiler import ProfilerActivity, profile

Times = dict[str, list[float]]
"""Seconds of each step, by model."""


def shuffled(names: Iterable[str], rounds: int, seed: int = 0) -> Iterator[tuple[int, str]]:
    """Yield the number of each round with every name, in a new random order each round."""
    generator, order = random.Random(seed), list(names)
    for number in range(rounds):
        generator.shuffle(order)
        yield from ((number, name) for name in order)


@torch.no_grad()
def in_turn(
    calls: Mapping[str, Callable[[], object]], steps: int, *, warmup: int = 2, seed: int = 0
) -> Times:
    """Time every call once in each of `steps` steps, after `warmup` untimed steps."""
    times: Times = {name: [] for name in calls}
    gc.collect()
    gc.disable()  # a collection would slow down a random model
    try:
        for step, name in shuffled(calls, warmup + steps, seed):
            began = time.perf_counter()
            calls[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if step >= warmup:
                times[name].append(time.perf_counter() - began)
    finally:
        gc.enable()
    return times


@dataclass(frozen=True)
class Ratio:
    """The ratio of the times of two models."""

    middle: float
    low: float
    high: float
    """Bounds of the 95 % interval."""

    def __str__(self) -> str:
        return f"{self.middle:.3f} ({self.low:.3f} to {self.high:.3f})"


def ratio(times: Sequence[float], base: Sequence[float]) -> Ratio:
    """Return the median ratio of two models' times in the same steps."""
    logs = np.log(np.asarray(times) / np.asarray(base))
    # Not BCa, which needs the jackknife: that is degenerate for a median.
    interval = bootstrap(
        (logs,), np.median, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return Ratio(*np.exp([np.median(logs), interval.low, interval.high]).tolist())


@torch.no_grad()
def operations(call: Callable[[], object]) -> list[str]:
    """Return the names of the operations of a call in order, from PyTorch's profiler."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        call()
    events = sorted(profiler.events(), key=lambda event: event.time_range.start)
    return [event.name for event in events]
