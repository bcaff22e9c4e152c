"""Fits what a machine computes and holds, from two short runs of a shape with random weights."""

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
from transformers import LlamaConfig

import lorakit
from lorakit.compute.batching import PACKED_STEP
from lorakit.compute.objective import LanguageModellingLoss
from lorakit.data.packing import pack
from lorakit.errors import ConfigurationError, LorakitError
from lorakit.models.dtypes import dtype_name
from lorakit.models.faster import make_faster
from lorakit.planning.batches import language_example
from lorakit.planning.machine import Machine, measure
from lorakit.planning.products import Product, time_products
from lorakit.planning.shape import new_mode, planning
from lorakit.planning.step import Step, run_step, shorten

TRIALS: tuple[dict[str, int], ...] = (
    {"count": 4, "length": 48, "targets": 24},
    {"count": 8, "length": 96, "targets": 24},
)
"""Batches of the two runs."""

SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
"""A Llama of 50 million parameters: large enough that products decide, and soon made."""

MOST = 3.0
"""How many times as fast or as slow as single passes those of a step are found at most."""

MARGIN = 1.1
"""On the memory that was seen beyond tensors: a plan that says too little costs more than one that says too much."""


def calibrate(device: torch.device, dtype: torch.dtype) -> Machine:
    """Run two short trainings, and fit this machine's constants to them.

    Raises:
        ConfigurationError: The device is no CPU.
        LorakitError: A run failed.
    """
    if device.type != "cpu":
        raise ConfigurationError(
            f"calibrate is for the CPU, and base.device is {device}: on a GPU the rates are measured in any case."
        )
    config = LlamaConfig(**SHAPE)  # type: ignore[arg-type]
    measured = [_try(config, dtype, trial) for trial in TRIALS]
    steps = [_simulate(config, dtype, trial) for trial in TRIALS]
    machine = measure(device, dtype)
    tried: dict[Product, float] = {}
    for step in steps:
        tried |= time_products(step.work.products, device, machine.estimate)
    return fit(machine, steps, measured, tried)


def fit(
    machine: Machine,
    steps: list[Step],
    measured: list[dict[str, Any]],
    tried: Mapping[Product, float],
) -> Machine:
    """Fit `machine` to what runs took.

    Time: the rate of memory traffic with which the runs come out in all; how long products take is known, and two runs
    would not tell more rates apart. Memory: the share beyond tensors that the last and largest run had.

    Args:
        machine: The rates of single products and passes.
        steps: What the runs are known to compute and to hold.
        measured: Of each run ``ready`` and ``peak``, bytes before the first step and at most, and ``seconds``.
        tried: Seconds of products.
    """
    traffic = sum(s.work.traffic for s in steps)
    predicted = sum(machine.seconds(s.work, tried) for s in steps)
    passes = traffic / machine.traffic
    left = sum(m["seconds"] for m in measured) - (predicted - passes)
    # The machine may have been busy with something else, in the runs or when its products were tried.
    fitted = dataclasses.replace(
        machine, traffic=traffic / min(max(left, passes / MOST), passes * MOST)
    )
    return _with_memory(fitted, steps, measured)


def _with_memory(machine: Machine, steps: list[Step], measured: list[dict[str, Any]]) -> Machine:
    # Of the larger run, in which what libraries load at their first step weighs little.
    step, run = steps[-1], measured[-1]
    tensors = sum(step.peak.values())
    beyond = run["peak"] - run["ready"] - tensors - machine.packed * step.widest
    today = datetime.date.today().isoformat()
    return dataclasses.replace(
        machine,
        slack=float(min(max(MARGIN * beyond / tensors, 0.05), 1.0)),
        origin=f"calibrated on {today}, by two short runs",
    )


def _try(config: LlamaConfig, dtype: torch.dtype, trial: dict[str, int]) -> dict[str, Any]:
    settings = config.to_diff_dict()
    settings.pop("transformers_version", None)
    settings["model_type"] = config.model_type
    given = {**trial, "config": settings, "dtype": dtype_name(dtype)}
    done = subprocess.run(
        [sys.executable, "-m", "lorakit.planning.trial"],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode:
        raise LorakitError(
            f"A run of the calibration ended with status {done.returncode}: {done.stderr.strip()[-500:]}"
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


def _simulate(config: LlamaConfig, dtype: torch.dtype, trial: dict[str, int]) -> Step:
    from transformers import AutoModelForCausalLM

    examples = [
        language_example(n, trial["length"], trial["targets"]) for n in range(trial["count"])
    ]
    batch = pack(examples, 0, step=PACKED_STEP)
    with planning(new_mode()):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        lorakit.attach(model, lorakit.LoRA())
        model.train()
        make_faster(model)
        return run_step(
            model,
            shorten(model),
            LanguageModellingLoss(path="fused"),
            batch,
            autocast=contextlib.nullcontext(),
            accumulates=False,
        )
