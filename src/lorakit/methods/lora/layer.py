"""A and B on one layer: shared by every kind of layer.

Each kind sees its weight as one matrix ``W`` of shape (out, in), and its adapter as two thin factors
``B`` (out, R) and ``A`` (R, in), so that merging, DoRA, PiSSA and export are written once:

- a fused projection stacks one A per adapted slice and places each B in its slice's rows (zero elsewhere);
- PiSSA appends its frozen start with a minus sign: ``[B, -B0] [A; A0]``;
- a tied output head reads the embedding's factors transposed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lorakit.errors import ConfigurationError
from lorakit.methods.lora.init import GAUSSIAN_STD, Init
from lorakit.methods.module import AdapterModule, merge_dtype
from lorakit.models.roles import RowSlice
from lorakit.ops import dropout


class LoRALayer(AdapterModule):
    """One adapter's factors on one layer; subclasses know the layer's kind.

    Args:
        layer: The layer to adapt (its dimensions and device are read, nothing is changed).
        rank: Rank of the adapter (of each slice, for a fused projection).
        scaling: Factor on ``B A``.
        alpha: The constant behind `scaling`, kept for the file.
        dropout: Dropout probability of the branch's input.
        slices: Adapted rows of a fused projection; empty adapts all rows.
        dora: Learn one magnitude per adapted output row.
        dtype: Dtype of the trained tensors.
    """

    kind: str = ""
    weight_name: str = "weight"

    def __init__(
        self,
        layer: nn.Module,
        *,
        rank: int,
        scaling: float,
        alpha: float,
        dropout: float = 0.0,
        slices: tuple[RowSlice, ...] = (),
        dora: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.rank, self.scaling, self.alpha, self.dropout = rank, scaling, alpha, dropout
        self.slices = slices
        self.scales = not dora
        weight = getattr(layer, self.weight_name)
        A_shape, B_shape = self.factor_shapes(layer)
        options = {"dtype": dtype, "device": weight.device}
        self.lora_A = nn.Parameter(torch.empty(A_shape, **options))
        self.lora_B = nn.Parameter(torch.empty(B_shape, **options))
        self.out_features = self.dimensions(layer)[1]
        rows = sum(s.total for s in slices) or self.out_features
        self.magnitude = nn.Parameter(torch.empty(rows, **options)) if dora else None
        self.register_buffer("initial_A", None)
        self.register_buffer("initial_B", None)

    # --- what a kind defines -------------------------------------------------------------------

    @classmethod
    def dimensions(cls, layer: nn.Module) -> tuple[int, int]:
        """(in, out) of the layer's weight as one matrix."""
        raise NotImplementedError

    def factor_shapes(self, layer: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes in which A and B are stored; by default the matrices themselves."""
        n_in, n_out = self.dimensions(layer)
        count = max(1, len(self.slices))
        rows = sum(s.total for s in self.slices) or n_out
        return (count * self.rank, n_in), (rows, self.rank)

    def weight_matrix(self, layer: nn.Module) -> Tensor:
        """The layer's weight as an (out, in) matrix: a view, or ``W_q`` in float32 if it is quantised."""
        raise NotImplementedError

    def to_weight(self, matrix: Tensor, layer: nn.Module) -> Tensor:
        """An (out, in) matrix in the layout of the layer's own weight."""
        raise NotImplementedError

    def branch(self, layer: nn.Module, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """``B A x`` (unscaled) in the shape of the layer's output."""
        raise NotImplementedError

    # --- start ---------------------------------------------------------------------------------

    @torch.no_grad()
    def initialise(self, layer: nn.Module, init: Init) -> None:
        """Set A, B (and the magnitude) so that the adapter's effect is zero."""
        if init == "pissa":
            self._initialise_pissa(layer)
        else:
            self._initialise_factors(init)
        if self.magnitude is not None:
            self.magnitude.copy_(self.row_norms(layer)[self._rows()])

    def _initialise_factors(self, init: Init) -> None:
        if init == "gaussian":
            nn.init.normal_(self.lora_A, std=GAUSSIAN_STD)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def _initialise_pissa(self, layer: nn.Module) -> None:
        """Start from W's main singular directions (Meng et al. 2024): ``scaling * B0 A0`` is W's best rank-r part."""
        W = self.weight_matrix(layer)
        if W.is_meta:
            return
        W = W.to(merge_dtype(W))
        parts = [W[s.rows().to(W.device)] for s in self.slices] or [W]
        A_parts, B_parts = [], []
        for part in parts:
            U, S, Vh = torch.linalg.svd(part, full_matrices=False)
            root = (S[: self.rank] / abs(self.scaling)).sqrt()
            A_parts.append(root[:, None] * Vh[: self.rank])
            B_parts.append(U[:, : self.rank] * root * math.copysign(1.0, self.scaling))
        self.lora_A.copy_(torch.cat(A_parts).view(self.lora_A.shape))
        self.lora_B.copy_(torch.cat(B_parts).view(self.lora_B.shape))
        self.initial_A = self.lora_A.detach().clone()
        self.initial_B = self.lora_B.detach().clone()

    # --- the factors as matrices -----------------------------------------------------------------

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (R, in) and B (out, R) of the whole layer, with ``delta W = scaling * B A``."""
        A, B = self._as_matrices(self.lora_A, self.lora_B)
        if self.initial_A is not None:
            A0, B0 = self._as_matrices(self.initial_A, self.initial_B)
            A, B = torch.cat([A, A0]), torch.cat([B, -B0], dim=1)
        return A, B

    def _as_matrices(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        if not self.slices:
            return A, B
        placed = B.new_zeros(self.out_features, A.shape[0])
        blocks = torch.block_diag(*B.split([s.total for s in self.slices]))
        return A, placed.index_copy(0, self._rows(), blocks)

    def _rows(self) -> Tensor:
        """Indices of the adapted output rows, slice after slice."""
        if not self.slices:
            return torch.arange(self.out_features, device=self.lora_B.device)
        return torch.cat([s.rows() for s in self.slices]).to(self.lora_B.device)

    # --- effect ----------------------------------------------------------------------------------

    def adapt(self, layer: nn.Module, x: Tensor, output: Tensor, weight: float) -> Tensor:
        A, B = self.factors()
        x = self.drop(x)
        if self.magnitude is not None:
            return self._adapt_dora(layer, x, output, A, B, self.magnitude)
        return output + (weight * self.scaling) * self.branch(layer, x, A, B)

    def drop(self, x: Tensor) -> Tensor:
        """Dropout on the branch's input alone; the frozen layer sees `x` whole."""
        return dropout(x, self.dropout) if self.training and self.dropout else x

    def _adapt_dora(
        self,
        layer: nn.Module,
        x: Tensor,
        output: Tensor,
        A: Tensor,
        B: Tensor,
        magnitude: Tensor,
    ) -> Tensor:
        """``m / ||W + dW|| * (W + dW) x + b``, the norm taken as a constant (Liu et al. 2024, 4.3)."""
        norms = self.row_norms(layer, A.detach(), B.detach())
        rows = self._rows()
        factor = torch.ones_like(norms).index_copy(0, rows, magnitude.to(norms.dtype) / norms[rows])
        shape = self.output_shape(output)
        factor = factor.to(output.dtype).view(shape)
        bias = getattr(layer, "bias", None)
        bias = torch.zeros((), dtype=output.dtype, device=output.device) if bias is None else bias
        bias = bias.view(shape) if bias.ndim else bias
        return factor * (output - bias + self.scaling * self.branch(layer, x, A, B)) + bias

    def output_shape(self, output: Tensor) -> tuple[int, ...]:
        """Shape that broadcasts one number per output row against the layer's output."""
        return (-1,)

    def row_norms(
        self, layer: nn.Module, A: Tensor | None = None, B: Tensor | None = None
    ) -> Tensor:
        """Euclidean norm of each row of W, or of ``W + scaling * B A``."""
        W = self.weight_matrix(layer)
        W = W.to(merge_dtype(W))
        if A is not None and B is not None:
            W = W + self.scaling * (B.to(W.dtype) @ A.to(W.dtype))
        return torch.linalg.vector_norm(W.flatten(1), dim=1)

    # --- merging ---------------------------------------------------------------------------------

    def delta_matrix(self) -> Tensor:
        """``scaling * B A`` in float32 (or wider), shape (out, in)."""
        A, B = self.factors()
        dtype = merge_dtype(A, B)
        return (B.to(dtype) @ A.to(dtype)) * self.scaling

    def changed_weights(self, layer: nn.Module) -> list[str]:
        return [self.weight_name]

    def delta_weights(self, layer: nn.Module) -> dict[str, Tensor]:
        return {self.weight_name: self.to_weight(self.delta_matrix(), layer)}

    def merged_weights(self, layer: nn.Module) -> dict[str, Tensor] | None:
        if self.magnitude is None:
            return None
        W = self.weight_matrix(layer)
        merged = W.to(merge_dtype(W)) + self.delta_matrix().to(merge_dtype(W))
        rows = self._rows()
        norms = torch.linalg.vector_norm(merged.detach()[rows], dim=1)
        magnitude = self.magnitude.to(merged.dtype)
        factor = torch.ones_like(merged[:, 0]).index_copy(0, rows, magnitude / norms)
        return {self.weight_name: self.to_weight(factor[:, None] * merged, layer)}

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scaling={self.scaling:g}, kind={self.kind}"


def check_rank(path: str, rank: int, n_in: int, n_out: int) -> None:
    """Refuse a rank above the layer's width: such factors could be replaced by a full matrix."""
    if rank > min(n_in, n_out):
        raise ConfigurationError(
            f"Rank {rank} exceeds the width of '{path}', which maps {n_in} to {n_out} features. "
            f"Use a rank of at most {min(n_in, n_out)} there, for example "
            f"rank_pattern={{'{path.rsplit('.', 1)[-1]}': {min(n_in, n_out)}}}."
        )


def unsupported(layer: nn.Module, option: str) -> ConfigurationError:
    """The error for an option that a kind of layer cannot have."""
    return ConfigurationError(
        f"{option} cannot be used on {type(layer).__name__}. Leave it out or choose other targets."
    )
