"""LoRA on convolutions of any dimension, kernel, stride, padding, dilation and number of groups."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.errors import AdapterStateError, ConfigurationError
from lorakit.methods.lora.forms import ConvForm
from lorakit.methods.lora.layer import LoRALayer
from lorakit.models.layers import RowSlice

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d

_CONVOLVE: dict[int, Callable[..., Tensor]] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


class ConvLoRA(LoRALayer):
    """PEFT's factorisation: A is a convolution with the layer's kernel into `rank` channels, B is pointwise.

    A has shape (rank, in / groups, *kernel) and B (out, rank / groups, 1, ...), both with the layer's
    groups, so ``dW[o] = sum_r B[o, r] A[r]`` has the kernel's shape and can be merged. A PEFT file for a
    grouped layer has an ungrouped A (rank, in, *kernel), which can be used but not merged.
    """

    form_class = ConvForm

    @classmethod
    def largest_rank(cls, layer: nn.Module, slices: tuple[RowSlice, ...]) -> int:
        """Return the largest rank: the width of the groups together."""
        assert isinstance(layer, Convolution)
        n_in, n_out = cls.dimensions(layer)
        return layer.groups * min(n_in, n_out // layer.groups)

    @classmethod
    def check_rank(
        cls, path: str, layer: nn.Module, rank: int, slices: tuple[RowSlice, ...]
    ) -> None:
        """Reject a rank that is no multiple of the groups, or above the width of the groups together."""
        assert isinstance(layer, Convolution)
        groups = layer.groups
        if groups == 1:
            super().check_rank(path, layer, rank, slices)
            return
        largest = cls.largest_rank(layer, slices)
        if rank % groups or rank > largest:
            nearest = min(max(rank // groups, 1) * groups, largest)
            raise ConfigurationError(
                f"Rank {rank} does not fit '{path}', a convolution of {groups} groups. Use a multiple of {groups} up "
                f"to {largest} for it, for example rank_pattern={{'{path.rsplit('.', 1)[-1]}': {nearest}}}."
            )

    def factor_shapes(self, layer: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
        assert isinstance(layer, Convolution)
        channels = layer.in_channels // (layer.groups if self.form.grouped else 1)
        pointwise = (1,) * len(layer.kernel_size)
        return (
            (self.rank, channels, *layer.kernel_size),
            (layer.out_channels, self.rank // layer.groups, *pointwise),
        )

    def branch(self, layer: nn.Module, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        assert isinstance(layer, Convolution)
        padding = layer.padding
        if layer.padding_mode != "zeros":
            x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
            padding = 0
        convolve, groups = _CONVOLVE[A.ndim], layer.groups if self.form.grouped else 1
        h = convolve(x, A.to(x.dtype), None, layer.stride, padding, layer.dilation, groups)
        return _CONVOLVE[B.ndim](h, B.to(x.dtype), groups=layer.groups)

    def output_shape(self, output: Tensor) -> tuple[int, ...]:
        return (-1,) + (1,) * (self.lora_A.ndim - 2)

    def changed_weights(self, layer: nn.Module) -> list[str]:
        self._require_kernel()
        return super().changed_weights(layer)

    def _require_kernel(self) -> None:
        """Raise an AdapterStateError if the product of the factors is no kernel of the layer."""
        if self.form.groups > 1 and not self.form.grouped:
            raise AdapterStateError(
                "This adapter's file mixes all input channels of a grouped convolution, which a grouped kernel cannot "
                "express, so the adapter cannot be merged. Use it unmerged, or train an adapter with lorakit, whose "
                "factors are grouped."
            )

    def _product(self, A: Tensor, B: Tensor) -> Tensor:
        self._require_kernel()
        return super()._product(A, B)
