"""PEFT with `transformers.Trainer`.

Settings: precision, float32, autocast (bfloat16 with float32 weights), bfloat16 (weights of the base; PEFT keeps the
adapter in float32) or bfloat16 autocast (both); order, plain (the default), bucketed (by length) or grouped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import set_seed

from benchmarks.examples import Prepared
from benchmarks.systems import Trained, load_model
from benchmarks.systems.trainer import run_trainer

TARGETS = {
    "attention.qv": ["q_proj", "v_proj"],
    "all-linear": "all-linear",
    "attention": ["query", "key", "value", "attention.output.dense"],
}
"""lorakit's target names -> PEFT's target modules, for the models of the workloads."""


def train(prepared: Prepared, settings: dict[str, Any], scratch: Path) -> Trained:
    """Train in the precision and order of `settings`."""
    workload = prepared.workload
    precision = settings["precision"]
    base = load_model(prepared, "bfloat16" if "bfloat16" in precision else "float32")
    set_seed(workload.seed)
    model = get_peft_model(base, lora_config(prepared))  # type: ignore[arg-type]
    run_trainer(
        model,
        prepared,
        order=settings["order"],
        autocast="autocast" in precision,
        learning_rate=workload.learning_rate,
        scratch=scratch,
    )

    def in_float32() -> nn.Module:
        model.save_pretrained(scratch / "adapter")
        return PeftModel.from_pretrained(load_model(prepared, "float32"), scratch / "adapter")  # type: ignore[arg-type]

    return Trained(settings["order"], in_float32)


def lora_config(prepared: Prepared) -> LoraConfig:
    """Return PEFT's configuration of the adapter of the row."""
    workload = prepared.workload
    classifies = workload.task == "classification"
    return LoraConfig(
        task_type="SEQ_CLS" if classifies else "CAUSAL_LM",  # SEQ_CLS also trains the head
        r=workload.rank,
        lora_alpha=workload.alpha,  # type: ignore[arg-type]
        lora_dropout=workload.dropout,
        target_modules=TARGETS[workload.targets],
    )
