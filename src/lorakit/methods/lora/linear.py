"""LoRA on linear layers: `nn.Linear`, GPT-2's `Conv1D` (weight stored transposed), fused projections.

`nn.MultiheadAttention` reads the weights of its projections without calling a layer, so the adapter cannot add to an
output. There the effective weight replaces the parameter during the call.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.methods.lora.forms import AttentionForm, LinearForm
from lorakit.methods.lora.layer import LoRALayer, output_is_unshared
from lorakit.models.quantised import quantised_weight
from lorakit.ops.lora_linear import Product, lora_linear


class LinearLoRA(LoRALayer):
    """``y = W x + b + scaling * B A x`` (and B's bias) on a linear layer, whole or by slices of its output rows."""

    form_class = LinearForm
    by_token = True
    is_product = True

    def weight_matrix(self, layer: nn.Module) -> Tensor:
        quantised = quantised_weight(layer)
        return super().weight_matrix(layer) if quantised is None else quantised.matrix()

    def adapt(self, layer: nn.Module, x: Tensor, output: Tensor, weight: float) -> Tensor:
        """Return `LoRALayer.adapt`, by one autograd function that adds in place if possible."""
        if self.magnitude is not None or x.is_nested:
            return super().adapt(layer, x, output, weight)
        product = Product(None, *self.factors(), weight * self.scaling)
        in_place = output_is_unshared(layer)
        output = lora_linear(self.drop(x), output, [product], in_place=in_place)
        return output if self.lora_B_bias is None else self._add_bias(output, weight)

    def branch(self, layer: nn.Module, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype))


class AttentionLoRA(LoRALayer):
    """Adapts the `in_proj_weight` of `nn.MultiheadAttention`, whole or by its q, k and v rows."""

    form_class = AttentionForm
    shadows = ("in_proj_weight",)


class OutProjectionLoRA(LinearLoRA):
    """Adapts the `out_proj` of `nn.MultiheadAttention`, a linear layer that is never called."""

    shadows = ("weight",)
