"""LoRA on the projections of `nn.MultiheadAttention`.

The module reads its weights without calling a layer, so the adapter cannot add to an output. The effective
weight replaces the parameter during the call.
"""

from __future__ import annotations

from torch import nn

from lorakit.methods.lora.forms import AttentionForm
from lorakit.methods.lora.layer import LoRALayer, unsupported
from lorakit.methods.lora.linear import LinearLoRA


class AttentionLoRA(LoRALayer):
    """Adapts `in_proj_weight`, whole or by its q, k and v rows."""

    form_class = AttentionForm
    shadows = ("in_proj_weight",)

    def __init__(self, layer: nn.Module, **options) -> None:
        assert isinstance(layer, nn.MultiheadAttention)
        if not layer._qkv_same_embed_dim:
            raise unsupported(layer, "LoRA with kdim or vdim that differ from embed_dim")
        super().__init__(layer, **options)

    @classmethod
    def dimensions(cls, layer: nn.Module) -> tuple[int, int]:
        assert isinstance(layer, nn.MultiheadAttention)
        return layer.embed_dim, 3 * layer.embed_dim


class OutProjectionLoRA(LinearLoRA):
    """Adapts the module's `out_proj`, a linear layer that is never called."""

    shadows = ("weight",)
