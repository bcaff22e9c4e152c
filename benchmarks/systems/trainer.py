"""`transformers.Trainer` on the batches of a row, set up for speed, without evaluation or logging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.utils import logging

from benchmarks.examples import Prepared
from benchmarks.workloads import Order, Workload


def shared_arguments(workload: Workload, learning_rate: float, scratch: Path) -> dict[str, Any]:
    """Return the arguments that `Trainer` and TRL's `SFTTrainer` share: everything but how they compute."""
    return {
        "output_dir": str(scratch / "trainer"),
        "per_device_train_batch_size": workload.batch_size,
        "num_train_epochs": 1,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "constant",
        "use_cpu": not torch.cuda.is_available(),  # Trainer rejects bf16 on a CPU without it
        "train_sampling_strategy": "sequential",  # keep the order of the examples
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": workload.seed,
    }


def run_trainer(
    model: nn.Module,
    prepared: Prepared,
    *,
    order: Order,
    autocast: bool,
    learning_rate: float,
    scratch: Path,
) -> None:
    """Train `model` in place on the batches of `order`, in bfloat16 autocast or in the dtype of its weights."""
    logging.set_verbosity_error()
    checkpointing: dict[str, Any] = {}
    if prepared.workload.checkpointing:
        checkpointing["gradient_checkpointing"] = True
        checkpointing["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    arguments = TrainingArguments(
        **shared_arguments(prepared.workload, learning_rate, scratch),
        bf16=autocast,
        **checkpointing,
        remove_unused_columns=False,
    )
    examples: list[dict[str, Any]] = [e for batch in prepared.in_order(order) for e in batch]
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=examples,  # type: ignore[arg-type]
        data_collator=prepared.collate,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
