"""Supervised fine-tuning with TRL: pass SFTTrainer the adapted model and no peft_config."""

from pathlib import Path

import torch
from datasets import Dataset
from tiny_base import PAIRS, arguments, load_base
from trl import SFTConfig, SFTTrainer

import lorakit

args = arguments()
model, tokenizer = load_base(args.model)
adapters = lorakit.attach(
    model, lorakit.LoRA(rank=8, alpha=16, targets="all-linear"), name="mine", seed=0
)

trainer = SFTTrainer(
    model=model,
    processing_class=tokenizer,
    train_dataset=Dataset.from_list(PAIRS),  # TRL computes the loss on completions
    args=SFTConfig(
        output_dir=args.out,
        max_steps=20,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=5,
        save_strategy="no",
        bf16=torch.cuda.is_available(),
        report_to="none",
    ),
)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

adapters.save(Path(args.out, "adapter"), tokenizer=tokenizer, overwrite=True)
