"""Several adapters over one base: choose one, mix two, serve one for each row, merge one."""

import torch
from tiny_base import TEXTS, arguments, load_base

import lorakit

args = arguments()
model, tokenizer = load_base(args.model)
for name in ("formal", "casual"):
    adapters = lorakit.attach(model, lorakit.LoRA(rank=4, targets="attention.qv"), name=name)
    for parameter in adapters.trainable_parameters(name):  # in place of training
        torch.nn.init.normal_(parameter, std=0.1)
print(adapters)

batch = tokenizer(TEXTS[:3], padding=True, return_tensors="pt")
logits = {}
with torch.no_grad():
    for name in ("formal", "casual", None):  # None is the base, as if nothing were attached
        adapters.activate(name)
        logits[name] = model(**batch).logits

    adapters.activate({"formal": 0.7, "casual": 0.3})
    logits["mixed"] = model(**batch).logits

    with adapters.per_sample(["casual", None, "formal"]):  # one batch, an adapter for each row
        logits["by row"] = model(**batch).logits

    adapters.merge("formal")  # no cost at inference; the base's weights are kept aside
    logits["merged"] = model(**batch).logits
    adapters.unmerge()  # and come back bit for bit

adapters.remove("casual")
adapters.save(args.out, overwrite=True)
adapters.detach()  # the model is what it was
