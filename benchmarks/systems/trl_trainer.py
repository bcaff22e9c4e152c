"""TRL's `SFTTrainer`, the usual way to fine-tune a language model, with PEFT's adapter in its `peft_config`.

It reads the rows of the other systems as tokens (`input_ids` and `completion_mask`), one of its documented inputs, and
computes the loss on the completions only, its default for rows with a prompt and a completion.

Settings: defaults, true to keep everything that `SFTConfig` chooses: bfloat16 autocast over float32 weights, gradient
checkpointing, padded batches. Otherwise precision, float32, autocast or bfloat16 (weights of the base; PEFT keeps the
adapter in float32), without gradient checkpointing unless the row asks for it; padding_free, to flatten a batch into
one row. Always order, as in peft_trainer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars
from peft import PeftModel
from torch import nn
from transformers import PrinterCallback
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from benchmarks.examples import IGNORED, Prepared
from benchmarks.systems import Trained, load_model
from benchmarks.systems.peft_trainer import lora_config
from benchmarks.systems.trainer import shared_arguments
from lorakit.models.loading import load_tokenizer


def train(prepared: Prepared, settings: dict[str, Any], scratch: Path) -> Trained:
    """Train in the precision and order of `settings`."""
    logging.set_verbosity_error()
    disable_progress_bars()
    trainer = sft_trainer(prepared, settings, scratch)
    trainer.remove_callback(PrinterCallback)
    trainer.train()

    def in_float32() -> nn.Module:
        trainer.model.save_pretrained(scratch / "adapter")  # type: ignore[union-attr]
        return PeftModel.from_pretrained(load_model(prepared, "float32"), scratch / "adapter")  # type: ignore[arg-type]

    return Trained(settings["order"], in_float32)


def sft_trainer(prepared: Prepared, settings: dict[str, Any], scratch: Path) -> SFTTrainer:
    """Return the trainer, ready to train on the batches of `settings`."""
    workload = prepared.workload
    precision = settings.get("precision", "")
    chosen: dict[str, Any] = {}
    if not settings.get("defaults"):
        chosen |= {
            "bf16": "autocast" in precision,
            "gradient_checkpointing": workload.checkpointing,
        }
    if settings.get("padding_free"):
        chosen |= {"padding_free": True, "max_length": None}
    return SFTTrainer(
        model=load_model(prepared, "bfloat16" if "bfloat16" in precision else "float32"),  # type: ignore[arg-type]
        args=SFTConfig(
            **shared_arguments(workload, workload.learning_rate, scratch),
            completion_only_loss=True,
            **chosen,
        ),
        train_dataset=Dataset.from_list(
            [tokens(e) for batch in prepared.in_order(settings["order"]) for e in batch]
        ),
        processing_class=load_tokenizer(prepared.base),
        peft_config=lora_config(prepared),
    )


def tokens(example: dict[str, Any]) -> dict[str, list[int]]:
    """Return an example in TRL's format for rows that are already tokenised."""
    mask = [int(label != IGNORED) for label in example["labels"]]
    return {"input_ids": example["input_ids"], "completion_mask": mask}
