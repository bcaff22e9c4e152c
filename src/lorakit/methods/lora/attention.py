"""LoRA on the projections of `nn.MultiheadAttention`.

The module reads its weights without calling a layer, so there is no output to add to: the effective
weight takes the parameter's place for the length of the call.
"""

from __future__ import annotations

from torch import Tensor, nn

from lorakit.methods.lora.layer import LoRALayer, unsupported
from lorakit.methods.lora.linear import LinearLoRA


class AttentionLoRA(LoRALayer):
    """Adapts `in_proj_weight`, whole or by its q, k and v rows."""

    kind = "attention"
    weight_name = "in_proj_weight"
    shadows = ("in_proj_weight",)

    def __init__(self, layer: nn.Module, **options) -> None:
        assert isinstance(layer, nn.MultiheadAttention)
        if not layer._qkv_same_embed_dim:
            raise unsupported(layer, "LoRA with kdim or vdim that differ from embed_dim")
        _refuse_dropout(layer, options)
        super().__init__(layer, **options)

    @classmethod
    def dimensions(cls, layer: nn.Module) -> tuple[int, int]:
        assert isinstance(layer, nn.MultiheadAttention)
        return layer.embed_dim, 3 * layer.embed_dim

    def weight_matrix(self, layer: nn.Module) -> Tensor:
        return layer.in_proj_weight  # type: ignore[return-value]

    def to_weight(self, matrix: Tensor, layer: nn.Module) -> Tensor:
        return matrix


class OutProjectionLoRA(LinearLoRA):
    """Adapts the module's `out_proj`, a linear layer that is never called."""

    shadows = ("weight",)

    def __init__(self, layer: nn.Module, **options) -> None:
        _refuse_dropout(layer, options)
        super().__init__(layer, **options)


def _refuse_dropout(layer: nn.Module, options: dict) -> None:
    if options.get("dropout"):
        raise unsupported(layer, "dropout on the adapter's branch")
