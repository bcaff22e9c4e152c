"""Measure the speed of training on a copy of a loaded base, with a few steps."""

from __future__ import annotations

import copy
import dataclasses
import gc
import itertools
import time
from statistics import median

from lorakit.data import DataTask, ExampleSet
from lorakit.models.dtype_choice import resolve_dtype
from lorakit.models.loading import Base
from lorakit.training.config import TrainConfig
from lorakit.training.job import Job
from lorakit.training.noise import own_generators
from lorakit.training.schedule import Step
from lorakit.training.setup import assemble
from lorakit.training.step import optimizer_step

STEPS = 4
"""Steps to time, after one that fills caches."""

SECONDS = 5.0
"""Seconds after which no further step begins. If the first step takes longer, its time counts."""


def seconds_per_step(config: TrainConfig, task: DataTask, base: Base, train: ExampleSet) -> float:
    """Train a new adapter on a copy of `base` for a few steps, and return the median time of a step in seconds.

    The steps are those of the first epoch whose number of tokens is closest to the mean. They train a copy,
    because not all settings of a run can be undone (compiled blocks, gradient checkpointing). The global random
    generators end in the states that they had before.

    Raises:
        LorakitError: A setting does not fit the data or the model, or the loss is not finite.
    """
    resolved, _ = resolve_dtype(config.base, batch_size=config.batch_size)
    config = dataclasses.replace(config, base=resolved)
    with own_generators(config.seed, base.model.device):
        copied = dataclasses.replace(base, model=copy.deepcopy(base.model))
        seconds = _median_seconds(assemble(config, task, copied, train))
    del copied
    gc.collect()  # a model with an adapter has reference cycles
    return seconds


def _median_seconds(job: Job) -> float:
    seconds: list[float] = []
    for step, examples in enumerate(_typical_steps(job)[: 1 + STEPS]):
        if sum(seconds) > SECONDS:
            break
        start = time.perf_counter()
        optimizer_step(job, examples, step)
        seconds.append(time.perf_counter() - start)
    return median(seconds[1:] or seconds)


def _typical_steps(job: Job) -> list[Step]:
    """Return the steps of the first epoch, those with an average number of tokens first."""
    plan, lengths = job.step_plan, job.train.lengths
    tokens = [
        (sum(lengths[i] for i in step), step)
        for step in itertools.islice(plan.steps(), plan.steps_per_epoch)
    ]
    mean = sum(lengths) / plan.steps_per_epoch
    return [step for _, step in sorted(tokens, key=lambda item: abs(item[0] - mean))]
