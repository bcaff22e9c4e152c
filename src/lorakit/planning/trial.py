"""One short run of a shape with random weights, in a process of its own: what a calibration measures.

python -m lorakit.planning.trial    reads its settings as JSON from standard input, prints its figures as JSON
"""

from __future__ import annotations

import json
import sys
import time
from statistics import median
from typing import Any

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import lorakit
from lorakit.compute.batching import PACKED_STEP
from lorakit.compute.objective import LanguageModellingLoss
from lorakit.data.packing import pack
from lorakit.models.faster import make_faster
from lorakit.planning.batches import language_example
from lorakit.training.memory import peak_memory

STEPS = 6


def main() -> None:
    """Train for a few steps, and print the process's memory and the middle step's time."""
    given: dict[str, Any] = json.load(sys.stdin)
    config = AutoConfig.for_model(**given["config"])
    dtype = getattr(torch, given["dtype"])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    lorakit.attach(model, lorakit.LoRA())
    model.train()
    make_faster(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    examples = [
        language_example(n, given["length"], given["targets"]) for n in range(given["count"])
    ]
    batch = pack(examples, 0, step=PACKED_STEP)
    objective = LanguageModellingLoss(path="fused")
    ready = psutil.Process().memory_info().rss
    seconds = []
    for _ in range(STEPS):
        began = time.perf_counter()
        objective.loss_sum(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    # The first steps make what later ones keep.
    figures = {
        "ready": ready,
        "peak": peak_memory(torch.device("cpu")),
        "seconds": median(seconds[2:]),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
