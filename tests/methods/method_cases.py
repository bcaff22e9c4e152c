"""Every method except LoRA on models that it supports: the cases of the tests of their common interface."""

from __future__ import annotations

from dataclasses import dataclass

import tiny_models
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lorakit import (
    BitFit,
    BottleneckAdapter,
    Combined,
    FullFineTuning,
    LoRA,
    PrefixEmbedding,
    PrefixLayer,
)
from lorakit.methods import Method
from lorakit.methods.virtual_tokens import VirtualTokens


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
        """Inputs of the base."""
        return tiny_models.example_batch(self.arch, model)

    def batch(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """Inputs of the adapted model."""
        batch = self.plain_batch(model)
        tokens = getattr(self.method, "virtual_tokens", VirtualTokens())
        return batch if not tokens.total else with_virtual_tokens(batch, tokens)


def with_virtual_tokens(batch: dict[str, Tensor], tokens: VirtualTokens) -> dict[str, Tensor]:
    """A batch with the prefix after each first token and the infix at the end."""
    fills = {"input_ids": None, "attention_mask": 1, "labels": -100}
    return {
        name: torch.tensor(
            [tokens.place(row, keep=1, fill=fills.get(name, 0)) for row in x.tolist()]
        )
        for name, x in batch.items()
    }


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
    **{
        f"{name} {arch}": Case(arch, method, merges=False)
        for name, method in (
            ("prefix embedding", PrefixEmbedding(prefix_length=3, infix_length=2)),
            ("prefix layer", PrefixLayer(prefix_length=3, infix_length=2)),
        )
        for arch in ("llama", "gpt2", "roberta", "deberta-v2")
    },
    "lora and prefix embedding": Case(
        "llama",
        Combined(
            methods=(LoRA(targets="all-linear", dropout=0.1), PrefixEmbedding(prefix_length=2))
        ),
        merges=False,
    ),
    "lora, biases and prefix layer": Case(
        "roberta",
        Combined(
            methods=(LoRA(rank=2), BitFit(), PrefixLayer(prefix_length=2, infix_length=1)),
            train_modules="classifier",
        ),
        merges=False,
    ),
    "prefix and head": Case(
        "roberta", PrefixLayer(prefix_length=2, train_modules="classifier"), merges=False
    ),
}
COMPILED = [
    ("bitfit gpt2", 1, "aot_eager"),
    ("houlsby llama", 1, "aot_eager"),
    ("prefix layer gpt2", 2, "aot_eager"),  # a first block has no vectors
]
"""One case of each kind, with its number of blocks and its backend, because compiling takes seconds."""


QUICK = (
    *("bitfit gpt2", "bitfit and head", "houlsby llama", "lin bert", "pfeiffer deberta-v2"),
    *("dropped layers", "top layers", "prefix embedding gpt2", "prefix layer llama"),
    *("prefix layer roberta", "lora, biases and prefix layer"),
)
"""Every method, on architectures that change from one to the next; the other cases are slow."""


def seen(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """The model's logits, without a graph."""
    with torch.no_grad():
        return model(**batch).logits
