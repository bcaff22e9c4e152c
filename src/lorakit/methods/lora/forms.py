"""The form of A and B on each kind of layer: their shapes, and the weight that they change.

Adapters on a live model (`LoRALayer`) and in a file (`StoredLayer`) use the same classes. An instance holds only
facts that A and B do not show. With r the rank, A and B have these shapes:

============== ===================================== =======================================
kind           A                                     B
============== ===================================== =======================================
linear         (r, in)                               (out, r)
attention      (r, embed_dim)                        (3 * embed_dim, r)
embedding      (r, num_embeddings)                   (embedding_dim, r)
conv           (r, in or in / groups, *kernel)       (out, r / groups, 1, ...)
experts        (experts * r, in)                     (experts * out, r)
============== ===================================== =======================================

A linear or attention layer may be adapted by slices of its output rows. A then stacks r rows for each slice,
(number of slices * r, in), and B the rows of the slices, (sum of widths, r).

`to_peft` converts to PEFT's one pair for the whole layer. It only moves numbers, so it is exact to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from lorakit.errors import AdapterFileError
from lorakit.models.layers import RowSlice

Factors = tuple[Tensor, Tensor]
"""A and B."""


class NotExpressibleError(AdapterFileError):
    """PEFT's format cannot represent an adapter."""


def in_each_group(A: Tensor, A0: Tensor, groups: int) -> Tensor:
    """Return ``[A; A0]`` within each group, because B has the columns of one group."""
    parts = [t.unflatten(0, (groups, -1)) for t in (A, A0)]
    return torch.cat(parts, dim=1).flatten(0, 1)


@dataclass(frozen=True, kw_only=True)
class FactorForm:
    """Two matrices A (r, in) and B (out, r), or such a pair for each slice. Subclasses override what differs."""

    kind: ClassVar[str]
    """Name of the kind of layer in files."""
    weight_name = "weight"
    """Attribute of the adapted layer that holds the changed weight."""
    supports_bias = False
    """Whether B may have a bias (`LoRA.lora_bias`)."""
    limits_rank = True
    """Whether a rank above the sizes of A and B is superfluous."""
    slices: tuple[RowSlice, ...] = ()
    """The adapted output rows of a fused projection; empty means all rows."""
    transposed: bool = False
    """linear, experts: the layer stores its weight as (..., in, out), as GPT-2's Conv1D does."""
    groups: int = 1
    """conv: groups of the convolution. experts: number of experts, each with its rows of A and B."""
    grouped: bool = True
    """conv: whether A reads the input channels of one group; PEFT's A reads all input channels."""

    @classmethod
    def of(cls, layer: Any, slices: tuple[RowSlice, ...], grouped: bool) -> FactorForm:
        """Return the form on a live layer; each kind uses the arguments that apply to it."""
        return cls()

    def required_shapes(self, A: Tensor, B: Tensor) -> str | None:
        """Return the shapes that A and B must have, or None if they have them."""
        count, rows = len(self.slices), sum(s.total for s in self.slices)
        if (
            A.ndim == B.ndim == 2
            and A.shape[0] == max(1, count) * B.shape[1]
            and rows in (0, len(B))
        ):
            return None
        return (
            f"A ({count} * rank, in) and B ({rows}, rank)"
            if count
            else "A (rank, in) and B (out, rank)"
        )

    def rank(self, A: Tensor) -> int:
        """Return the rank of the adapter; of each slice, for a fused projection."""
        return A.shape[0] // max(1, len(self.slices))

    def out_features(self, B: Tensor) -> int:
        """Return the number of rows of the weight as a matrix."""
        return self.slices[0].groups * self.slices[0].stride if self.slices else B.shape[0]

    def rows(self, device: torch.device | str = "cpu") -> Tensor:
        """Return the indices of the adapted rows of a fused projection, slice by slice."""
        return torch.cat([s.rows(device) for s in self.slices])

    def part_rank(self, rank: int) -> int:
        """Return the rank of each of the `parts` of a layer of at most this rank; at least 1 for each group."""
        return max(1, rank // self.rank_groups)

    @property
    def rank_groups(self) -> int:
        """Number of groups that share the layer's rank."""
        return self.groups

    def weight_of(self, path: str) -> str:
        """Return the name of the changed parameter of the layer at a path."""
        return f"{path}.{self.weight_name}"

    # --- the weight and its change as matrices ---------------------------------------------------

    def matrix(self, W: Tensor, shape: tuple[int, int]) -> Tensor:
        """Return a view of the weight as a matrix (out, in) of this shape; of another one if W does not fit."""
        return W

    def weight(self, matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Undo `matrix`: return the weight, for convolutions in this shape."""
        return matrix.reshape(shape)

    def parts(self, A: Tensor, B: Tensor) -> list[Factors]:
        """Return A (rank, in) and B (rows, rank) of each slice of a fused projection or group of a convolution."""
        A, B = A.flatten(1), B.flatten(1)
        blocks = B.split([s.total for s in self.slices]) if self.slices else B.chunk(self.groups)
        return list(zip(A.chunk(len(blocks)), blocks, strict=True))

    def weight_parts(self, matrix: Tensor) -> list[Tensor]:
        """Return the rows of the weight's matrix to which each of the `parts` is added."""
        if self.slices:
            return [matrix[s.rows(matrix.device)] for s in self.slices]
        return list(matrix.chunk(self.groups))

    def all_rows(self, A: Tensor, B: Tensor) -> Factors:
        """Return A and B of all rows of the layer; B is zero outside the slices."""
        if not self.slices:
            return A, B
        blocks = torch.block_diag(*B.split([s.total for s in self.slices]))
        whole = B.new_zeros(self.out_features(B), A.shape[0])
        return A, whole.index_copy(0, self.rows(B.device), blocks)

    def bias_of_all_rows(self, bias: Tensor, B: Tensor) -> Tensor:
        """Return B's bias for all rows of the layer, zero outside the slices."""
        if not self.slices:
            return bias
        rows = self.rows(bias.device)
        return bias.new_zeros(self.out_features(B)).index_copy(0, rows, bias)

    # --- other libraries -------------------------------------------------------------------------

    def to_peft(self, A: Tensor, B: Tensor) -> Factors:
        """Return PEFT's A and B, of all rows and input channels; raise `NotExpressibleError` if there are none."""
        return self.all_rows(A, B)

    def peft_rank(self, A: Tensor) -> int:
        """Return PEFT's rank of an A that `to_peft` returned."""
        return A.shape[0]


class LinearForm(FactorForm):
    """A linear layer or GPT-2's `Conv1D`, whole or by slices of a fused projection."""

    kind = "linear"
    supports_bias = True

    @classmethod
    def of(cls, layer: Any, slices: tuple[RowSlice, ...], grouped: bool) -> LinearForm:
        return cls(slices=slices, transposed=isinstance(layer, Conv1D))

    def matrix(self, W: Tensor, shape: tuple[int, int]) -> Tensor:
        matrix = W.mT if self.transposed else W
        # A loralib file does not record whether the base transposes its weight.
        return matrix.mT if matrix.shape != shape == tuple(matrix.mT.shape) else matrix

    def weight(self, matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
        return matrix.mT.contiguous() if self.transposed else matrix


class AttentionForm(LinearForm):
    """The input projections of `nn.MultiheadAttention`, whole or by slices."""

    kind = "attention"
    supports_bias = False
    weight_name = "in_proj_weight"


class EmbeddingForm(FactorForm):
    """An embedding table as a linear map from one-hot ids, W = E^T."""

    kind = "embedding"

    def matrix(self, W: Tensor, shape: tuple[int, int]) -> Tensor:
        return W.mT

    def weight(self, matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
        return matrix.mT.contiguous()


class ConvForm(FactorForm):
    """PEFT's factors of a convolution: A has the layer's kernel, B is pointwise."""

    kind = "conv"
    supports_bias = True
    limits_rank = False

    @classmethod
    def of(cls, layer: Any, slices: tuple[RowSlice, ...], grouped: bool) -> ConvForm:
        return cls(groups=layer.groups, grouped=grouped)

    def required_shapes(self, A: Tensor, B: Tensor) -> str | None:
        are_kernels = 3 <= A.ndim == B.ndim <= 5 and B.shape[2:].numel() == 1
        fit = (
            are_kernels and A.shape[0] == self.groups * B.shape[1] and not B.shape[0] % self.groups
        )
        return None if fit else "A (rank, in, *kernel) and B (out, rank / groups, 1, ...)"

    def matrix(self, W: Tensor, shape: tuple[int, int]) -> Tensor:
        return W.flatten(1)

    def to_peft(self, A: Tensor, B: Tensor) -> Factors:
        """Return A with zeros at the input channels of the other groups, and B."""
        if not self.grouped or self.groups == 1:
            return A, B
        wide = torch.block_diag(*A.flatten(1).chunk(self.groups))
        return wide.view(A.shape[0], -1, *A.shape[2:]), B


class ExpertsForm(FactorForm):
    """The experts' weights, which are stacked in one tensor: a pair of factors for each expert, one below the other."""

    kind = "experts"

    @classmethod
    def of(cls, layer: Any, slices: tuple[RowSlice, ...], grouped: bool) -> ExpertsForm:
        return cls(groups=layer.weight.shape[0], transposed=layer.transposed)

    def required_shapes(self, A: Tensor, B: Tensor) -> str | None:
        is_pair = A.ndim == B.ndim == 2
        fit = is_pair and A.shape[0] == self.groups * B.shape[1] and not B.shape[0] % self.groups
        return None if fit else "A (experts * rank, in) and B (experts * out, rank)"

    def rank(self, A: Tensor) -> int:
        return A.shape[0] // self.groups

    @property
    def rank_groups(self) -> int:
        return 1

    def peft_rank(self, A: Tensor) -> int:
        return self.rank(A)

    def weight_of(self, path: str) -> str:
        return path

    def matrix(self, W: Tensor, shape: tuple[int, int]) -> Tensor:
        if W.ndim != 3:
            return W
        matrix = (W.mT if self.transposed else W).flatten(0, 1)
        # A file of PEFT does not record whether the base transposes its weight.
        other = (W if self.transposed else W.mT).flatten(0, 1)
        return other if matrix.shape != shape == tuple(other.shape) else matrix

    def weight(self, matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
        stacked = matrix.unflatten(0, (self.groups, -1))
        return stacked.mT.contiguous() if self.transposed else stacked
