"""Forward passes of several models in turn, and by how much one is slower than another.

In every step each model computes the same, in a new order, so that a machine that slows down for a moment
does so in all of them. What is compared are the times of one step: the ratio of two models is the median of
their ratios step by step, and its interval is that of a bootstrap over the steps.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import bootstrap
from torch.profiler import ProfilerActivity, profile

Times = dict[str, list[float]]
"""Seconds of each step, by model."""


def in_turn(
    calls: Mapping[str, Callable[[], object]], steps: int, *, warmup: int = 2, seed: int = 0
) -> Times:
    """Time every call once in each of `steps` steps, after `warmup` steps that do not count."""
    generator = random.Random(seed)
    names = list(calls)
    times: Times = {name: [] for name in names}
    gc.collect()
    gc.disable()  # a collection would fall upon whoever is at work
    try:
        for step in range(warmup + steps):
            generator.shuffle(names)
            for name in names:
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
    """How many times as long one model takes as another."""

    middle: float
    low: float
    high: float
    """Ends of the 95 % interval."""

    def __str__(self) -> str:
        return f"{self.middle:.3f} ({self.low:.3f} to {self.high:.3f})"


def ratio(times: Sequence[float], base: Sequence[float]) -> Ratio:
    """Return the median ratio of two models' times in the same steps."""
    logs = np.log(np.asarray(times) / np.asarray(base))
    # BCa's correction is no help here: it needs the jackknife, which a median has not.
    interval = bootstrap(
        (logs,), np.median, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return Ratio(*np.exp([np.median(logs), interval.low, interval.high]).tolist())


def operations(call: Callable[[], object]) -> list[str]:
    """Return the names of the operations that a call runs, in their order, as PyTorch's profiler saw them."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        call()
    events = sorted(profiler.events(), key=lambda event: event.time_range.start)
    return [event.name for event in events]
