"""LoRA on convolutions of any dimension, kernel, stride, padding, dilation and number of groups."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.errors import AdapterStateError, ConfigurationError
from lorakit.methods.lora.layer import LoRALayer, unsupported

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d

_CONVOLVE: dict[int, Callable[..., Tensor]] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


class ConvLoRA(LoRALayer):
    """PEFT's factorisation: A is a convolution with the layer's kernel into `rank` channels, B is pointwise.

    A has shape (rank, in / groups, *kernel) and B (out, rank / groups, 1, ...), both grouped as the
    layer is, so that ``dW[o] = sum_r B[o, r] A[r]`` has the kernel's own shape and merges. A file of
    PEFT for a grouped layer holds an ungrouped A (rank, in, *kernel); it runs, and cannot be merged.
    """

    kind = "conv"

    def __init__(self, layer: nn.Module, *, grouped: bool = True, **options) -> None:
        assert isinstance(layer, Convolution)
        if options["rank"] % layer.groups:
            raise ConfigurationError(
                f"Rank {options['rank']} is no multiple of the convolution's {layer.groups} groups. "
                f"Use a multiple of {layer.groups}, by rank_pattern if only for this layer."
            )
        self.groups, self.grouped_A = layer.groups, grouped
        super().__init__(layer, **options)

    @classmethod
    def dimensions(cls, layer: nn.Module) -> tuple[int, int]:
        assert isinstance(layer, Convolution)
        return layer.weight[0].numel(), layer.out_channels

    def factor_shapes(self, layer: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
        assert isinstance(layer, Convolution)
        channels = layer.in_channels // (layer.groups if self.grouped_A else 1)
        A_shape = (self.rank, channels, *layer.kernel_size)
        return A_shape, (
            layer.out_channels,
            self.rank // layer.groups,
            *(1 for _ in layer.kernel_size),
        )

    def weight_matrix(self, layer: nn.Module) -> Tensor:
        return layer.weight.flatten(1)  # type: ignore[union-attr, operator]

    def to_weight(self, matrix: Tensor, layer: nn.Module) -> Tensor:
        return matrix.view(layer.weight.shape)  # type: ignore[union-attr]

    def _as_matrices(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        return A, B  # `branch` and `delta_matrix` need the kernels' shapes

    def factors(self) -> tuple[Tensor, Tensor]:
        if self.initial_A is None:
            return self.lora_A, self.lora_B
        return (
            torch.cat([self.lora_A, self.initial_A]),
            torch.cat([self.lora_B, -self.initial_B], dim=1),
        )

    def _initialise_pissa(self, layer: nn.Module) -> None:
        if self.groups > 1:
            raise unsupported(layer, "init='pissa' with groups > 1")
        super()._initialise_pissa(layer)

    def branch(self, layer: nn.Module, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        assert isinstance(layer, Convolution)
        h = convolve(layer, x, A.to(x.dtype), groups=self.groups if self.grouped_A else 1)
        return _CONVOLVE[B.ndim](h, B.to(x.dtype), groups=self.groups)

    def output_shape(self, output: Tensor) -> tuple[int, ...]:
        return (-1, *(1 for _ in range(self.lora_A.ndim - 2)))

    def row_norms(self, layer, A=None, B=None) -> Tensor:
        if A is not None and B is not None:
            W = self.weight_matrix(layer)
            W = W.to(torch.promote_types(W.dtype, torch.float32))
            return torch.linalg.vector_norm(W + self.delta_matrix().detach().to(W.dtype), dim=1)
        return super().row_norms(layer)

    def delta_matrix(self) -> Tensor:
        if self.groups > 1 and not self.grouped_A:
            raise AdapterStateError(
                "This adapter's file mixes all input channels of a grouped convolution, which no kernel of "
                "the layer can express, so it cannot be merged. Run it unmerged, or train one with lorakit, "
                "whose factors are grouped."
            )
        A, B = self.factors()
        dtype = torch.promote_types(torch.promote_types(A.dtype, B.dtype), torch.float32)
        A_GRK = A.to(dtype).flatten(1).unflatten(0, (self.groups, -1))
        B_GOR = B.to(dtype).flatten(1).unflatten(0, (self.groups, -1))
        return (B_GOR @ A_GRK).flatten(0, 1) * self.scaling


class LoralibConvLoRA(LoRALayer):
    """loralib's factorisation, read from its files: ``dW = (B A)`` viewed in the kernel's shape.

    A is (rank * K, in * K) and B (out / groups * K, rank * K) for a square kernel of width K. The view
    mixes rows and taps, so the kernel is replaced for the call; dropout on the branch has no meaning.
    """

    kind = "conv-loralib"
    shadows = ("weight",)

    def __init__(
        self, layer: nn.Module, *, rank: int, scaling: float, alpha: float, **options
    ) -> None:
        if options.get("dropout") or options.get("dora"):
            raise unsupported(layer, "dropout or dora with loralib's convolution factors")
        super().__init__(layer, rank=rank, scaling=scaling, alpha=alpha, **options)

    @classmethod
    def dimensions(cls, layer: nn.Module) -> tuple[int, int]:
        return ConvLoRA.dimensions(layer)

    def factor_shapes(self, layer: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
        assert isinstance(layer, Convolution)
        width = layer.kernel_size[0]
        rows = layer.weight.numel() // (layer.in_channels * width)
        return (self.rank * width, layer.in_channels * width), (rows, self.rank * width)

    def to_weight(self, matrix: Tensor, layer: nn.Module) -> Tensor:
        return matrix.view(layer.weight.shape)  # type: ignore[union-attr]


def convolve(layer: Convolution, x: Tensor, kernel: Tensor, *, groups: int) -> Tensor:
    """The layer's convolution with another kernel: same stride, padding (of any mode) and dilation."""
    padding = layer.padding
    if layer.padding_mode != "zeros":
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        padding = 0
    return _CONVOLVE[kernel.ndim](x, kernel, None, layer.stride, padding, layer.dilation, groups)
