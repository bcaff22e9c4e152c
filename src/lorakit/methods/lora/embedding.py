"""LoRA on an embedding table, and the same adapter on an output head tied to it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.methods.lora.forms import EmbeddingForm
from lorakit.methods.lora.init import GAUSSIAN_STD, Init
from lorakit.methods.lora.layer import LoRALayer
from lorakit.methods.lora.linear import LinearLoRA


class EmbeddingLoRA(LoRALayer):
    """``e(i) = E[i] + scaling * B A[:, i]``: the table as a linear map from one-hot ids, W = E^T.

    A is (rank, num_embeddings) and starts at zero, B is (embedding_dim, rank) and starts random, as in
    loralib: a zero B would leave A's sparse gradient at zero for every row but the batch's.

    As in `nn.Embedding`, the vector of `padding_idx` is looked up like any other and is not trained: its column of A
    gets no gradient. That column starts at zero (except with PiSSA), so the vector stays the base's.
    """

    form_class = EmbeddingForm
    by_token = True

    @classmethod
    def dimensions(cls, layer: nn.Module) -> tuple[int, int]:
        n_out, n_in = super().dimensions(layer)
        return n_in, n_out

    def _initialise_factors(self, init: Init) -> None:
        nn.init.zeros_(self.lora_A)
        nn.init.normal_(self.lora_B, std=GAUSSIAN_STD if init == "gaussian" else 1.0)

    def drop(self, x: Tensor) -> Tensor:
        return x  # token ids; loralib and PEFT have no dropout here either

    def branch(self, layer: nn.Module, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        # Some models scale the looked up vectors (Gemma by sqrt(d)), so scale their change too.
        scale = getattr(layer, "embed_scale", None)
        vectors = F.embedding(x, A.T, layer.padding_idx) @ B.T  # type: ignore[arg-type]
        vectors = vectors if scale is None else vectors * scale
        return vectors.to(layer.weight.dtype)  # type: ignore[union-attr]


class TiedHeadLoRA(LinearLoRA):
    """An embedding's adapter applied to the output head that shares its table.

    ``logits = E h + scaling * A^T B^T h`` with the transposed factors of the embedding. It has no tensors itself.
    """

    def __init__(self, layer: nn.Module, source: EmbeddingLoRA) -> None:
        with torch.device("meta"):
            super().__init__(layer, rank=source.rank, scaling=source.scaling, alpha=source.alpha)
        del self.lora_A, self.lora_B
        # In a tuple, so that nn.Module does not register the embedding's factors a second time.
        self.source = (source,)

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = self.source[0].factors()
        return B.T, A.T
