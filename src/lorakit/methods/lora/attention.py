"""LoRA on the projections of `nn.MultiheadAttention`.

The module reads its weights without calling a layer, so the adapter cannot add to an output. The effective
weight replaces the parameter during the call.
"""

from __future__ import annotations

from lorakit.methods.lora.forms import AttentionForm
from lorakit.methods.lora.layer import LoRALayer
from lorakit.methods.lora.linear import LinearLoRA


class AttentionLoRA(LoRALayer):
    """Adapts `in_proj_weight`, whole or by its q, k and v rows."""

    form_class = AttentionForm
    shadows = ("in_proj_weight",)


class OutProjectionLoRA(LinearLoRA):
    """Adapts the module's `out_proj`, a linear layer that is never called."""

    shadows = ("weight",)
