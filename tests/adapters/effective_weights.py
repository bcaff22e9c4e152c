"""A small model, and an independent computation of its adapted forward pass.

The reference shares no code with lorakit. It holds every base tensor and every adapter's factors, computes the
effective weights ``W + sum of weight * scaling * B A`` as plain matrices, and multiplies with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorakit.methods.bitfit import BitFit
from lorakit.methods.lora.method import LoRA

VOCABULARY, WIDTH, INNER, CLASSES = 7, 4, 6, 5

# (in, out) of each layer's weight as the matrix that LoRA adapts: the table maps one-hot ids.
LAYERS = {
    "table": (VOCABULARY, WIDTH),
    "block.up": (WIDTH, INNER),
    "block.down": (INNER, WIDTH),
    "scores": (WIDTH, CLASSES),
}
BIASES = ("block.up.bias", "block.down.bias", "scores.bias")

Method = LoRA | BitFit
Weights = tuple[tuple[str, float], ...]
"""Name and weight of each adapter that acts on a token; empty for the base alone."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x).tanh()
        return x + self.down(hidden)


class SmallModel(nn.Module):
    """Ids (batch, length) to scores (batch, length, CLASSES), in float64."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.block = Block()
        self.scores = nn.Linear(WIDTH, CLASSES)
        generator = torch.Generator().manual_seed(seed)
        self.double()
        for parameter in self.parameters():
            parameter.data = 0.7 * random(parameter.shape, generator)

    def get_input_embeddings(self) -> nn.Module:
        """Name the table of tokens, as transformers' models do: its rows are those of the batch."""
        return self.table

    def forward(
        self, ids: Tensor, probe: Tensor | None = None, use_reentrant: bool | None = None
    ) -> Tensor:
        """Return the scores; `use_reentrant` None runs the block without a checkpoint.

        `probe` is added to the embedded ids. A reentrant checkpoint needs an input with a gradient.
        """
        x = self.table(ids)
        x = x if probe is None else x + probe
        if use_reentrant is None:
            return self.scores(self.block(x))
        return self.scores(checkpoint(self.block, x, use_reentrant=use_reentrant))


def random(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Return normal float64 numbers."""
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64)


@dataclass
class PlainAdapter:
    """The tensors of one adapter, by keys such as ``block.up.A``, ``block.up.B`` and ``scores.bias``."""

    method: Method
    tensors: dict[str, Tensor]

    @classmethod
    def drawn(cls, method: Method, generator: torch.Generator) -> PlainAdapter:
        """Return random tensors of the shapes and names that the method defines on `SmallModel`."""
        tensors: dict[str, Tensor] = {}
        if isinstance(method, LoRA):
            for path in method.targets:
                n_in, n_out = LAYERS[path]
                tensors[f"{path}.A"] = random((method.rank, n_in), generator)
                tensors[f"{path}.B"] = random((n_out, method.rank), generator)
                if method.dora:
                    tensors[f"{path}.magnitude"] = random((n_out,), generator)
                if method.bias == "lora_only":
                    tensors[f"{path}.bias"] = random((n_out,), generator)
            if method.train_modules:
                tensors["scores.weight"] = random((CLASSES, WIDTH), generator)
                tensors["scores.bias"] = random((CLASSES,), generator)
        else:
            for name in BIASES:
                tensors[name] = random((LAYERS[name.removesuffix(".bias")][1],), generator)
        return cls(method, {key: (t / 2).requires_grad_() for key, t in tensors.items()})

    @property
    def trained(self) -> dict[str, Tensor]:
        """The tensors that replace a base tensor."""
        return {key: t for key, t in self.tensors.items() if key.endswith(("weight", "bias"))}

    @property
    def linear(self) -> bool:
        """Whether the effect is linear in the adapter's weight."""
        return not self.trained and not (isinstance(self.method, LoRA) and self.method.dora)

    @property
    def scaling(self) -> float:
        assert isinstance(self.method, LoRA)
        root = 0.5 if self.method.scaling == "rslora" else 1.0
        return self.method.alpha / self.method.rank**root

    def changed(self, change: float | None, generator: torch.Generator) -> PlainAdapter:
        """Return a copy with other values: noise of this size, or None for rounding to float32."""
        tensors = {}
        for key, tensor in self.tensors.items():
            value = tensor.detach()
            noisy = (
                value.float().double()
                if change is None
                else value + change * random(value.shape, generator)
            )
            tensors[key] = noisy.clone().requires_grad_()
        return PlainAdapter(self.method, tensors)


class EffectiveWeights:
    """The reference: base tensors by name, and the adapters by name."""

    def __init__(self, base: dict[str, Tensor]) -> None:
        self.base = base
        self.adapters: dict[str, PlainAdapter] = {}

    def accepts(self, weights: Weights) -> bool:
        """Return whether the adapters exist and can be combined with these weights."""
        if any(name not in self.adapters for name, _ in weights):
            return False
        alone = len(weights) == 1 and weights[0][1] == 1
        return alone or all(self.adapters[name].linear for name, _ in weights)

    def weights(self, choice: Weights) -> dict[str, Tensor]:
        """Return every effective tensor of the model under one choice."""
        tensors = dict(self.base)
        for name, weight in choice:
            adapter = self.adapters[name]
            tensors.update(adapter.trained)
            for path in LAYERS:
                if f"{path}.A" not in adapter.tensors:
                    continue
                A, B = adapter.tensors[f"{path}.A"], adapter.tensors[f"{path}.B"]
                W = tensors[f"{path}.weight"]
                delta = weight * adapter.scaling * (B @ A)
                W = W + (delta.T if path == "table" else delta)
                magnitude = adapter.tensors.get(f"{path}.magnitude")
                if magnitude is not None:  # DoRA: the norm of each row is a constant
                    W = W * (magnitude / W.detach().norm(dim=1))[:, None]
                tensors[f"{path}.weight"] = W
        return tensors

    def forward(self, ids: Tensor, choices: Sequence[Weights], probe: Tensor | None) -> Tensor:
        """Return the scores (batch, length, CLASSES).

        Args:
            ids: Token ids (batch, length).
            choices: The choice of each of the ``batch * length`` tokens, in row-major order.
            probe: Added to the embedded ids.
        """
        distinct = list(dict.fromkeys(choices))
        outputs = []
        for choice in distinct:
            W = self.weights(choice)
            x = W["table.weight"][ids.flatten()]
            x = x if probe is None else x + probe.flatten(0, 1)
            hidden = F.linear(x, W["block.up.weight"], W["block.up.bias"]).tanh()
            x = x + F.linear(hidden, W["block.down.weight"], W["block.down.bias"])
            outputs.append(F.linear(x, W["scores.weight"], W["scores.bias"]))
        index = torch.tensor([distinct.index(choice) for choice in choices])
        tokens = torch.stack(outputs)[index, torch.arange(len(index))]
        return tokens.view(*ids.shape, CLASSES)
