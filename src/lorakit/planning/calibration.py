"""Fit the constants of a machine to two short training runs of a small model with random weights."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import torch

from lorakit.compute.objective import LanguageModellingLoss
from lorakit.errors import ConfigurationError, LorakitError
from lorakit.models.dtypes import dtype_name
from lorakit.planning.machine import Machine, measure
from lorakit.planning.products import Product, time_products
from lorakit.planning.shape import new_mode, planning
from lorakit.planning.step import Step, run_step, shorten
from lorakit.planning.trial import build_batch, build_model

TRIALS: tuple[dict[str, int], ...] = (
    {"count": 4, "length": 48, "targets": 24},
    {"count": 8, "length": 96, "targets": 24},
)
"""Batches of the two runs: number of examples, and tokens and targets of each."""

SHAPE = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
"""A Llama of 50 million parameters: large enough that matrix products dominate, and quick to build."""

MOST = 3.0
"""Bound on the fitted rate of memory traffic, as a factor of the measured rate or its inverse."""

MARGIN = 1.1
"""Factor on the measured memory beyond tensors: a prediction that is too low costs more than one that is too high."""


def calibrate(device: torch.device, dtype: torch.dtype) -> Machine:
    """Run two short trainings with torch's current threads, and fit this machine's constants to them.

    Raises:
        ConfigurationError: The device is not a CPU.
        LorakitError: A run failed.
    """
    if device.type != "cpu":
        raise ConfigurationError(
            f"calibrate is for the CPU, but base.device is {device}. A plan for a GPU measures the rates anyway; "
            "omit calibrate."
        )
    trials = [{"config": SHAPE, "dtype": dtype_name(dtype), **batch} for batch in TRIALS]
    measured = [_run_trial(trial) for trial in trials]
    steps = [_simulate(trial) for trial in trials]
    machine = measure(device, dtype)
    timings = time_products([step.work.products for step in steps], device, machine.estimate)
    return fit(machine, steps, measured, timings.seconds)


def fit(
    machine: Machine,
    steps: list[Step],
    measured: list[dict[str, Any]],
    timings: Mapping[Product, float],
) -> Machine:
    """Fit `machine` to measured runs.

    Time: fit the rate of memory traffic so that the predicted total equals the measured one. The times of products are
    known, and two runs cannot separate more rates. Memory: fit the share beyond tensors to the last, largest run.

    `measured` has for each run ``ready`` and ``peak``, bytes before the first step and at the peak, and ``seconds``.
    `timings` are seconds of products.
    """
    traffic = sum(s.work.traffic for s in steps)
    predicted = sum(machine.seconds(s.work, timings) for s in steps)
    passes = traffic / machine.traffic
    rest = sum(run["seconds"] for run in measured) - (predicted - passes)
    # Other processes may have slowed down the runs or the timing of products.
    rest = min(max(rest, passes / MOST), passes * MOST)
    # In the larger run, memory that libraries allocate once at the first step is a small share.
    step, run = steps[-1], measured[-1]
    tensors = sum(step.peak.values())
    kernels = machine.kernel * len(step.work.products)
    beyond = run["peak"] - run["ready"] - tensors - machine.packed * step.widest - kernels
    return dataclasses.replace(
        machine,
        traffic=traffic / rest,
        slack=float(min(max(MARGIN * beyond / tensors, 0.05), 1.0)),
        origin=f"calibrated on {datetime.date.today()} with two short runs",
    )


def _run_trial(trial: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "lorakit.planning.trial"],
        input=json.dumps({**trial, "threads": torch.get_num_threads()}),
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode:
        raise LorakitError(
            f"A calibration run failed with exit status {done.returncode}. Plan without calibrate. "
            f"Its last output: {done.stderr.strip()[-500:]}"
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


def _simulate(trial: dict[str, Any]) -> Step:
    batch = build_batch(trial)
    with planning(new_mode()):
        model = build_model(trial)
        return run_step(
            model,
            shorten(model),
            LanguageModellingLoss(path="fused"),
            batch,
            autocast=contextlib.nullcontext(),
            accumulates=False,
        )
