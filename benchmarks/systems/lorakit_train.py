"""lorakit with default settings: `lorakit.train` on the file of rows.

Settings: method, lora (default) or full; compile, whether to compile the blocks; dtype, to compute in, auto by default.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import nn

import lorakit
from benchmarks.examples import Prepared
from benchmarks.systems import Trained, load_model
from lorakit.models.base_config import BaseConfig
from lorakit.training.config import OptimizerConfig, TrainConfig
from lorakit.training.loop import train as run_training


def train(prepared: Prepared, settings: dict[str, Any], scratch: Path) -> Trained:
    """Train, with the run folder in `scratch`."""
    workload = prepared.workload
    full = settings.get("method") == "full"
    lora = lorakit.LoRA(
        rank=workload.rank, alpha=workload.alpha, targets=workload.targets, dropout=workload.dropout
    )
    config = TrainConfig(
        base=BaseConfig(name=prepared.base, dtype=settings.get("dtype", "auto")),
        data=prepared.data,
        output=str(scratch / "run"),
        method="full" if full else "lora",
        lora=lorakit.LoRA() if full else lora,
        epochs=workload.epochs,
        batch_size=workload.batch_size,
        sampling="grouped" if workload.grouped else "random",
        gradient_checkpointing=workload.checkpointing,
        compile=settings.get("compile", False),
        seed=workload.seed,
        optimizer=OptimizerConfig(
            learning_rate=workload.full_learning_rate if full else workload.learning_rate,
            schedule="constant",
            warmup=0,
        ),
    )
    result = run_training(config)
    order = workload.orders[-1]
    _check_batches(result.folder, prepared.tokens(order))

    def in_float32() -> nn.Module:
        model = load_model(prepared, "float32")
        lorakit.load(model, result.adapter)
        return model

    return Trained(order, in_float32)


def _check_batches(run: Path, expected: list[int]) -> None:
    """Check that `lorakit.train` used the same batches as the other systems."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    totals = [0, *(json.loads(line)["tokens"] for line in lines)]
    tokens = [after - before for before, after in pairwise(totals)]
    if tokens != expected:
        raise RuntimeError(f"lorakit.train used batches of {tokens} tokens; expected {expected}")
