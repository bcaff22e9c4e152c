"""Train an adapter with your own loop: only the adapter's parameters are trainable."""

import torch
from tiny_base import TEXTS, arguments, load_base

import lorakit

args = arguments()
model, tokenizer = load_base(args.model)
adapters = lorakit.attach(
    model, lorakit.LoRA(rank=8, alpha=16, targets="all-linear"), name="mine", seed=0
)
print(adapters.summary())

batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
optimizer = torch.optim.AdamW(adapters.trainable_parameters(), lr=1e-2)

model.train()
losses = []
for step in range(30):
    loss = model(**batch, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    if step % 10 == 9:
        print(f"step {step + 1}: loss {losses[-1]:.3f}")

adapters.save(args.out, tokenizer=tokenizer, overwrite=True)
print(f"Saved the adapter to {args.out}")
