"""Every method beside LoRA on models that it applies to: what the tests of their common face run over."""

from __future__ import annotations

from dataclasses import dataclass

import tiny_models
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lorakit import BitFit, BottleneckAdapter, FullFineTuning
from lorakit.methods import Method


@dataclass(frozen=True)
class Case:
    """A method on a model."""

    arch: str
    method: Method
    merges: bool = True
    """Whether the effect can be folded into the base's weights."""

    def model(self, **settings) -> PreTrainedModel:
        return tiny_models.build(self.arch, **settings)

    def plain_batch(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """What the base understands."""
        return tiny_models.example_batch(self.arch, model)

    def batch(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """What the adapted model is given."""
        return self.plain_batch(model)


HALF_ADAPTED = BottleneckAdapter(
    size=4, activation="gelu", drop_layers=(0,), train_modules=("classifier", "output.LayerNorm")
)

CASES: dict[str, Case] = {
    **{
        f"bitfit {arch}": Case(arch, BitFit())
        for arch in ("gpt2", "bert", "deberta-v2", "bart", "gpt-neox")
    },
    "bitfit and head": Case("roberta", BitFit(train_modules="classifier")),
    **{
        f"{kind} {arch}": Case(arch, BottleneckAdapter(kind=kind, size=3), merges=False)
        for kind in ("houlsby", "lin", "pfeiffer")
        for arch in ("llama", "gpt2", "bert", "deberta-v2", "t5")
    },
    "dropped layers": Case("roberta", HALF_ADAPTED, merges=False),
    "top layers": Case("t5", FullFineTuning(top_layers=1)),
}
COMPILED = ("bitfit gpt2", "houlsby llama")
"""One case of each kind: compiling takes seconds."""


def seen(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """The model's logits, without a graph."""
    with torch.no_grad():
        return model(**batch).logits
