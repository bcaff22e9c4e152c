"""One short training run of a model with random weights, which a calibration measures in a separate process.

python -m lorakit.planning.trial    reads a trial as JSON from standard input and prints its measurements as JSON

A trial has ``config``, the model's configuration with its ``model_type``; ``dtype``; ``threads``, the number of torch's
threads; and the batch: ``count`` examples of ``length`` tokens with ``targets`` targets.
"""

from __future__ import annotations

import json
import sys
import time
from statistics import median
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lorakit.adapters import attach
from lorakit.compute.batching import PACKED_STEP
from lorakit.compute.objective import LanguageModellingLoss
from lorakit.data.packing import pack
from lorakit.methods import LoRA
from lorakit.models.faster import make_faster
from lorakit.models.float32_products import faster_float32
from lorakit.planning.batches import language_examples
from lorakit.training.memory import peak_memory

STEPS = 6


def build_model(trial: dict[str, Any]) -> PreTrainedModel:
    """Return the model of a trial with a LoRA adapter, ready to train."""
    config = AutoConfig.for_model(**trial["config"])
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, trial["dtype"]))
    attach(model, LoRA())
    model.train()
    make_faster(model)
    return model


def build_batch(trial: dict[str, Any]) -> dict[str, Tensor]:
    """Return the packed batch of a trial."""
    examples = language_examples(trial["count"], trial["length"], trial["targets"])
    return pack(examples, 0, step=PACKED_STEP)


@faster_float32()
def main() -> None:
    """Train for a few steps and print the process's memory and the median time of a step."""
    trial = json.load(sys.stdin)
    torch.set_num_threads(trial["threads"])
    torch.manual_seed(0)
    model = build_model(trial)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    batch = build_batch(trial)
    objective = LanguageModellingLoss(path="fused")
    ready = psutil.Process().memory_info().rss
    seconds = []
    for _ in range(STEPS):
        began = time.perf_counter()
        objective.loss_sum(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    figures = {
        "ready": ready,
        "peak": peak_memory(torch.device("cpu")),
        "seconds": median(seconds[2:]),  # without the first steps, which fill caches
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
