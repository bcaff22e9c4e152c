"""Train an adapter with Accelerate: on one device, or on several with `accelerate launch`.

The launcher's configuration chooses between data parallel, FSDP (version 2) and DeepSpeed.
"""

from pathlib import Path

import torch
from accelerate import Accelerator
from tiny_base import TEXTS, arguments, load_base
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling

import lorakit

args = arguments()
accelerator = Accelerator()
model, tokenizer = load_base(args.model)
adapters = lorakit.attach(
    model, lorakit.LoRA(rank=8, alpha=16, targets="all-linear"), name="mine", seed=0
)

loader = DataLoader(
    [tokenizer(text) for text in TEXTS],
    batch_size=2,
    collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
optimizer = torch.optim.AdamW(adapters.trainable_parameters(), lr=1e-2)
prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)

prepared.train()
losses = []
for _ in range(15):
    for batch in loader:
        loss = prepared(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    losses.append(loss.item())

accelerator.print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}")
# All processes call save: with FSDP or DeepSpeed each holds a part of the adapter.
adapters.save(
    Path(args.out),
    tokenizer=tokenizer,
    overwrite=True,
    is_main_process=accelerator.is_main_process,
)
