"""Measure two adapters of one base, combine them, and compress the result."""

import torch
from tiny_base import TEXTS, arguments, load_base

import lorakit
from lorakit import analysis

args = arguments()
model, tokenizer = load_base(args.model)
batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

for seed, name in enumerate(("one", "two")):  # the same task with two seeds
    adapters = lorakit.attach(
        model, lorakit.LoRA(rank=8, targets="attention.qv"), name=name, seed=seed
    )
    adapters.activate(name)
    optimizer = torch.optim.AdamW(adapters.trainable_parameters(name), lr=1e-2)
    for _ in range(20):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
one, two = adapters.stored("one"), adapters.stored("two")

spectrum = analysis.adapter_spectrum(one)
print(f"rank {spectrum.rank_for(0.9)} of 8 keeps 90 % of the change's squared norm")

similar = analysis.adapter_similarity(one, two)
for layer, similarity in similar.A.items():  # phi(1, 1): is the leading direction the same?
    print(f"{layer}: {similarity.first:.2f}, at random {similarity.random[0, 0]:.2f}")

path = "model.layers.0.self_attn.q_proj" if args.model is None else next(iter(one.layers))
W, layer = model.get_submodule(path).weight.detach(), one.layers[path]
table = analysis.amplification(W, layer.A, layer.B, layer.scaling)
print(f"{path}: the change is {table.factor:.1f} times as large as W in its directions")

mean = analysis.combine_adapters([one, two], [0.5, 0.5])  # the exact sum, at rank 16
small = analysis.compress_adapter(mean.adapter, rank=4)
print(f"compression from rank 16 to 4 loses {small.error:.1%} of the change")
analysis.save(small, args.out, inputs=[], settings={"compress": 4}, overwrite=True)

losses = {}
lorakit.load(model, args.out, name="small")
with torch.no_grad():
    for choice in (None, "one", "two", "small"):
        adapters.activate(choice)
        losses[choice] = float(model(**batch, labels=labels).loss)
        print(f"{choice or 'base':>6}: loss {losses[choice]:.3f}")
adapters.detach()
