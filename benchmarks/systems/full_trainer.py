"""Full fine-tuning with `transformers.Trainer`, in bfloat16 autocast with float32 weights if bfloat16 is fast.

Settings: order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.examples import Prepared
from benchmarks.systems import Trained, load_model
from benchmarks.systems.trainer import run_trainer
from lorakit.models.dtype_choice import compute_dtype


def train(prepared: Prepared, settings: dict[str, Any], scratch: Path) -> Trained:
    """Train all parameters."""
    model = load_model(prepared, "float32")
    run_trainer(
        model,
        prepared,
        order=settings["order"],
        autocast=compute_dtype("auto") == torch.bfloat16,
        learning_rate=prepared.workload.full_learning_rate,
        scratch=scratch,
    )
    return Trained(settings["order"], lambda: model)
