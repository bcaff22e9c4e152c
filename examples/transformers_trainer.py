"""Train an adapter with transformers' Trainer, in one process or with torchrun; its checkpoints include the adapter."""

from pathlib import Path

from tiny_base import TEXTS, arguments, load_base
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

import lorakit

args = arguments()
model, tokenizer = load_base(args.model)
adapters = lorakit.attach(
    model, lorakit.LoRA(rank=8, alpha=16, targets="all-linear"), name="mine", seed=0
)

trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=args.out,
        max_steps=20,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=5,
        save_steps=10,
        report_to="none",
    ),
    train_dataset=[tokenizer(text) for text in TEXTS],
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
trainer.train()  # resume_from_checkpoint=True resumes from the last checkpoint
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

# Any library loads a checkpoint as the adapted model. The adapter alone is a thousandth of its size:
adapters.save(
    Path(args.out, "adapter"),
    tokenizer=tokenizer,
    overwrite=True,
    is_main_process=trainer.is_world_process_zero(),
)
