"""Preference tuning with TRL: DPO on an adapted model, without a second model as the reference."""

from pathlib import Path

import torch
from datasets import Dataset
from tiny_base import PAIRS, arguments, load_base
from trl import DPOConfig, DPOTrainer

import lorakit

args = arguments()
model, tokenizer = load_base(args.model)
adapters = lorakit.attach(
    model, lorakit.LoRA(rank=8, alpha=16, targets="all-linear"), name="mine", seed=0
)
rejected = [pair["completion"] for pair in PAIRS[1:] + PAIRS[:1]]  # the answer of another prompt
preferences = [
    {"prompt": pair["prompt"], "chosen": pair["completion"], "rejected": other}
    for pair, other in zip(PAIRS, rejected, strict=True)
]

trainer = DPOTrainer(
    model=model,
    processing_class=tokenizer,
    train_dataset=Dataset.from_list(preferences),
    args=DPOConfig(
        output_dir=args.out,
        precompute_ref_log_probs=True,  # by the model itself, before the adapter is trained
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
