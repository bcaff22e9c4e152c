"""Load an adapter from lorakit with PEFT and transformers; convert a live PEFT model."""

import peft
import torch
from tiny_base import TEXTS, arguments, load_base

import lorakit

args = arguments()
model, tokenizer = load_base(args.model)
batch = tokenizer(TEXTS, padding=True, return_tensors="pt")

adapters = lorakit.attach(model, lorakit.LoRA(rank=4, alpha=8, targets="attention"), name="mine")
for parameter in adapters.trainable_parameters():  # instead of training
    torch.nn.init.normal_(parameter, std=0.1)
adapters.save(args.out, overwrite=True)
logits = {"lorakit": model(**batch).logits.detach()}

# PEFT and transformers load the folder like a PEFT adapter.
peft_model = peft.PeftModel.from_pretrained(load_base(args.model)[0], args.out)
logits["peft"] = peft_model(**batch).logits.detach()

transformers_model = load_base(args.model)[0]
transformers_model.load_adapter(args.out)
logits["transformers"] = transformers_model(**batch).logits.detach()

# Convert the live PEFT model: its base gets back its own modules and keys.
taken_over = lorakit.from_peft(peft_model)
logits["taken over"] = taken_over.model(**batch).logits.detach()
print(taken_over)

for name, values in logits.items():
    print(f"{name:>12}: differs by at most {(values - logits['lorakit']).abs().max():.1e}")
