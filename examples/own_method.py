"""A custom method in one file: (IA)^3, vectors that scale keys, values and the MLP's inner activations.

    lorakit train --method examples/own_method.py:IA3 --base.name smollm2-135m --data.train yours.jsonl --output out/ia3
    lorakit generate --method examples/own_method.py:IA3 --adapter out/ia3/adapter --prompt "..."

Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.errors import ConfigurationError
from lorakit.methods import AdapterModule
from lorakit.methods.trained import modules_named, parameters_below
from lorakit.models.layers import weight_shape
from lorakit.models.roles import resolve_targets


@dataclass(frozen=True, kw_only=True)
class IA3:
    """``l * (W x)``: a trained vector, initialised to 1, that scales the outputs of the target layers.

    This is (IA)^3 on models with a gated MLP, such as Llama. Without a gate, as in BERT, (IA)^3 scales after the
    nonlinearity, and this class before it.
    """

    targets: tuple[str, ...] | list[str] = ("attention.k", "attention.v", "mlp.up")
    train_modules: tuple[str, ...] = ()  # lorakit adds a new classification head here

    default_rate = 3e-3  # the default peak learning rate of a run

    def modules(
        self, model: nn.Module, dtype: torch.dtype | None = None
    ) -> dict[str, AdapterModule]:
        modules: dict[str, AdapterModule] = {}
        for place in resolve_targets(model, tuple(self.targets)):
            if place.slice is not None:  # some rows of a fused projection, such as k of q, k and v
                raise ConfigurationError(
                    f"IA3 cannot scale a slice of '{place.path}'. Choose other targets."
                )
            layer = model.get_submodule(place.path)
            modules[place.path] = Scale(layer, dtype or torch.float32)
        return modules

    def trained_parameters(self, model: nn.Module) -> list[str]:
        return parameters_below(model, modules_named(model, self.train_modules))


class Scale(AdapterModule):
    """The scaling vector of one layer."""

    scales = merges = False  # works only alone, with weight 1; merging would need a few more lines
    by_token = True  # each token is independent of the others

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        width = weight_shape(layer)[0]  # output rows, also of GPT-2's Conv1D
        device = next(layer.parameters()).device
        self.vector = nn.Parameter(torch.ones(width, dtype=dtype, device=device))

    def adapt(self, layer: nn.Module, x: Tensor, output: Tensor, weight: float) -> Tensor:
        return output * self.vector.to(output.dtype)


if __name__ == "__main__":
    from tiny_base import TEXTS, arguments, load_base

    import lorakit

    args = arguments()
    model, tokenizer = load_base(args.model)
    adapters = lorakit.attach(model, IA3(), name="mine")
    optimizer = torch.optim.AdamW(adapters.trainable_parameters(), lr=1e-1)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    losses = []
    for _ in range(10):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    adapters.save(args.out, overwrite=True)
    adapters.detach()

    # An adapter's file names its method but contains no code, so register the class.
    lorakit.use_method(IA3)
    adapters = lorakit.load(model, args.out, name="again")
    print(adapters.summary())
