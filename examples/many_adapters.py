"""Several adapters on one base: activate one, mix two, use one per row, merge one."""

import torch
from tiny_base import TEXTS, arguments, load_base

import lorakit

args = arguments()
model, tokenizer = load_base(args.model)
for name in ("formal", "casual"):
    adapters = lorakit.attach(model, lorakit.LoRA(rank=4, targets="attention.qv"), name=name)
    for parameter in adapters.trainable_parameters(name):  # instead of training
        torch.nn.init.normal_(parameter, std=0.1)
print(adapters)

batch = tokenizer(TEXTS[:3], padding=True, return_tensors="pt")
logits = {}
with torch.no_grad():
    for name in ("formal", "casual", None):  # None activates the base alone
        adapters.activate(name)
        logits[name] = model(**batch).logits

    adapters.activate({"formal": 0.7, "casual": 0.3})
    logits["mixed"] = model(**batch).logits

    with adapters.per_sample(["casual", None, "formal"]):  # one batch, one adapter per row
        logits["by row"] = model(**batch).logits

    adapters.merge("formal")  # no inference cost; keeps the base's weights
    logits["merged"] = model(**batch).logits
    adapters.unmerge()  # restores them bit for bit

adapters.remove("casual")
adapters.save(args.out, overwrite=True)
adapters.detach()  # restores the original model
