"""The module of a bottleneck adapter on one layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.methods.module import AdapterModule
from lorakit.models.checkpoints import caches_outputs

INIT_STD = 0.02
"""Standard deviation of both initial matrices: RoBERTa's initializer_range, as in the paper's code."""


class Bottleneck(AdapterModule):
    """A bottleneck adapter on the output of a layer: ``x + f(x)``.

    Args:
        width: Width d of the output, shape (..., d).
        size: Width r of the bottleneck.
        activation: The nonlinearity's name in `torch.nn.functional`.
        own_norm: Normalise the input of f with a trained LayerNorm.
        renormalise: The layer is a LayerNorm: add f of its output to its input and normalise again.
        options: Device and dtype of the tensors.
    """

    scales = merges = False
    by_token = True

    def __init__(
        self,
        width: int,
        size: int,
        *,
        activation: str,
        own_norm: bool,
        renormalise: bool,
        options: dict,
    ) -> None:
        super().__init__()
        self.activation, self.renormalise = activation, renormalise
        self.down_weight = nn.Parameter(torch.empty(size, width, **options))
        self.down_bias = nn.Parameter(torch.zeros(size, **options))
        self.up_weight = nn.Parameter(torch.empty(width, size, **options))
        self.up_bias = nn.Parameter(torch.zeros(width, **options))
        self.norm_weight = nn.Parameter(torch.ones(width, **options)) if own_norm else None
        self.norm_bias = nn.Parameter(torch.zeros(width, **options)) if own_norm else None
        for matrix in (self.down_weight, self.up_weight):
            nn.init.normal_(matrix, std=INIT_STD)

    def adapt(self, layer: nn.Module, x: Tensor, output: Tensor, weight: float) -> Tensor:
        f = self._f(output)
        base = x if self.renormalise else output
        # Add in place to save a tensor of full size, unless autocast gave f a narrower dtype or a checkpoint cached f.
        in_place = f.dtype == base.dtype and not caches_outputs()
        total = f.add_(base) if in_place else base + f
        return layer.forward(total) if self.renormalise else total

    def _f(self, x: Tensor) -> Tensor:
        # Cast the small parameters to the activations' dtype, not the large activations.
        if self.norm_weight is not None and self.norm_bias is not None:
            weight, bias = self.norm_weight.to(x.dtype), self.norm_bias.to(x.dtype)
            x = F.layer_norm(x, weight.shape, weight, bias)
        h = F.linear(x, self.down_weight.to(x.dtype), self.down_bias.to(x.dtype))
        h = getattr(F, self.activation)(h)
        return F.linear(h, self.up_weight.to(h.dtype), self.up_bias.to(h.dtype))

    def extra_repr(self) -> str:
        size, width = self.down_weight.shape
        return f"{width} -> {size} -> {width}, {self.activation}"
