"""A and B on one layer, for every layer type.

Each subclass treats its weight as one matrix ``W`` of shape (out, in), and its adapter as two thin factors
``B`` (out, R) and ``A`` (R, in). Merging, DoRA, PiSSA and export then need one implementation:

- a fused projection has one pair of factors per adapted slice: R is rank * slices, A stacks them, and B is zero
  outside the rows and columns of each slice;
- PiSSA appends its frozen initial factors with a minus sign: ``[B, -B0] [A; A0]``;
- a tied output head uses the transposed factors of the embedding.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks
from transformers.pytorch_utils import Conv1D

from lorakit.errors import ConfigurationError
from lorakit.methods.lora.forms import FactorForm, in_each_group
from lorakit.methods.lora.init import GAUSSIAN_STD, Init, decomposes
from lorakit.methods.module import AdapterModule, LowRank
from lorakit.models.checkpoints import caches_outputs
from lorakit.models.layers import RowSlice, device_of, type_name, weight_shape
from lorakit.models.packed import require_numbers
from lorakit.ops.autocast import no_autocast, wide_dtype
from lorakit.ops.derivatives import is_transformed
from lorakit.ops.dropout import dropout
from lorakit.ops.lora_linear import require_data

_CHUNK = 1 << 20
"""Elements of ``W + scaling * B A`` that DoRA's norms compute at a time, so that they fit into a CPU's caches. A
4096 x 4096 matrix at once took ten times as long."""
_LARGE_CHUNK = 1 << 24
"""The same on a GPU, where smaller chunks would spend more time on kernel launches."""
_NEW_TENSOR = (nn.Linear.forward, Conv1D.forward)
"""Forward methods that return a new tensor and keep no reference to it. Others, such as those of quantised layers, may
return a buffer that they still need."""


class LoRALayer(AdapterModule):
    """One adapter's factors on one layer, with a subclass for each layer type.

    Args:
        layer: The layer to adapt, which is not changed.
        rank: Rank of the adapter (of each slice, for a fused projection).
        scaling: Factor on ``B A``.
        alpha: The alpha of `scaling`, recorded in the file.
        dropout: Dropout probability of the branch's input.
        slices: Adapted rows of a fused projection; empty adapts all rows.
        grouped: Whether A of a grouped convolution reads the input channels of one group, or of all.
        lora_bias: Train a bias of B, one number per adapted output row.
        dora: Train one magnitude per adapted output row.
        dtype: Dtype of the trained tensors.
    """

    form_class: type[FactorForm]
    """The form of A and B on this layer type."""
    is_product: ClassVar[bool] = False
    """Whether ``B A x`` is the product of two matrices with each token's features."""
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_B_bias: nn.Parameter | None
    magnitude: nn.Parameter | None
    initial_A: Tensor | None
    initial_B: Tensor | None
    rank: int
    scaling: float
    alpha: float
    dropout: float
    form: FactorForm
    out_features: int

    def __init__(
        self,
        layer: nn.Module,
        *,
        rank: int,
        scaling: float,
        alpha: float,
        dropout: float = 0.0,
        slices: tuple[RowSlice, ...] = (),
        grouped: bool = True,
        lora_bias: bool = False,
        dora: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if dropout and self.shadows:
            raise unsupported(layer, "dropout on the adapter's branch")
        # The `__setattr__` of modules is slow, and a server loads thousands of these.
        self.__dict__.update(
            rank=rank,
            scaling=scaling,
            alpha=alpha,
            dropout=dropout,
            form=self.form_class.of(layer, slices, grouped),
            scales=not dora,
            merges=not lora_bias or getattr(layer, "bias", None) is not None,
            out_features=self.dimensions(layer)[1],
        )
        if dora:
            require_numbers(layer, self.form.weight_name, "dora reads")
        if lora_bias and (self.shadows or not self.form_class.supports_bias):
            raise unsupported(layer, "lora_bias")
        A_shape, B_shape = self.factor_shapes(layer)
        options = {"dtype": dtype, "device": device_of(layer)}
        rows = sum(s.total for s in slices) or self.out_features
        self._parameters.update(
            lora_A=nn.Parameter(torch.empty(A_shape, **options)),
            lora_B=nn.Parameter(torch.empty(B_shape, **options)),
            lora_B_bias=nn.Parameter(torch.zeros(rows, **options)) if lora_bias else None,
            magnitude=nn.Parameter(torch.empty(rows, **options)) if dora else None,
        )
        # The frozen initial factors of PiSSA; None for other initialisations.
        self._buffers.update(initial_A=None, initial_B=None)

    @property
    def slices(self) -> tuple[RowSlice, ...]:
        """The adapted rows of a fused projection; empty adapts all rows."""
        return self.form.slices

    # --- for subclasses to override --------------------------------------------------------------

    @classmethod
    def dimensions(cls, layer: nn.Module) -> tuple[int, int]:
        """Return (in, out) of the layer's weight as one matrix."""
        n_out, *others = weight_shape(layer)
        return math.prod(others), n_out

    @classmethod
    def largest_rank(cls, layer: nn.Module, slices: tuple[RowSlice, ...]) -> int:
        """Return the largest rank that a change of the layer's weight, or of one of its slices, can have."""
        n_in, n_out = cls.dimensions(layer)
        return min(n_in, n_out, *(s.total for s in slices))

    @classmethod
    def check_rank(
        cls, path: str, layer: nn.Module, rank: int, slices: tuple[RowSlice, ...]
    ) -> None:
        """Reject a rank above the width of the layer at `path`, which no weight change can have."""
        largest = cls.largest_rank(layer, slices)
        if rank > largest:
            n_in, n_out = cls.dimensions(layer)
            n_out //= cls.form_class.of(layer, slices, True).groups
            n_out = min((s.total for s in slices), default=n_out)
            name = path.rsplit(".", 1)[-1]
            raise ConfigurationError(
                f"Rank {rank} exceeds the width of '{path}', which maps {n_in} to {n_out} features. "
                f"Use a rank of at most {largest}, or set it for this layer alone: rank_pattern={{'{name}': "
                f"{largest}}} (--lora.rank_pattern.{name} {largest})."
            )

    def factor_shapes(self, layer: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes in which A and B are stored; by default those of the matrices."""
        n_in, n_out = self.dimensions(layer)
        count = max(1, len(self.slices))
        rows = sum(s.total for s in self.slices) or n_out
        return (count * self.rank, n_in), (rows, self.rank)

    def weight_matrix(self, layer: nn.Module) -> Tensor:
        """Return the layer's weight as an (out, in) matrix: a view, or ``W_q`` in float32 if it is quantised.

        Raises:
            ConfigurationError: Another library than bitsandbytes has quantised it.
        """
        require_numbers(layer, self.form.weight_name, "dora and init='pissa' read")
        n_in, n_out = self.dimensions(layer)
        return self.form.matrix(getattr(layer, self.form.weight_name), (n_out, n_in))

    def branch(self, layer: nn.Module, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """Return ``B A x`` (unscaled) in the shape of the layer's output."""
        raise NotImplementedError

    # --- initialisation --------------------------------------------------------------------------

    @torch.no_grad()
    def initialise(self, layer: nn.Module, init: Init) -> None:
        """Initialise A, B (and the magnitude) so that the adapter's effect is zero."""
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
        """Set ``scaling * B0 A0`` to the best rank-r approximation of W (PiSSA, Meng et al. 2024)."""
        if device_of(layer).type == "meta":
            return
        if decomposes():
            self._decompose(self.weight_matrix(layer))
        else:
            self._initialise_factors("kaiming")
        self.initial_A = self.lora_A.detach().clone()
        self.initial_B = self.lora_B.detach().clone()

    def _decompose(self, W: Tensor) -> None:
        """Set A and B to the leading singular vectors of W (out, in), each times the root of its singular value."""
        W = W.to(wide_dtype(W))
        rank = self.form.part_rank(self.rank)
        A_parts, B_parts = [], []
        for part in self.form.weight_parts(W):
            U, S, Vh = torch.linalg.svd(part, full_matrices=False)
            root = (S[:rank] / abs(self.scaling)).sqrt()
            A_parts.append(root[:, None] * Vh[:rank])
            B_parts.append(U[:, :rank] * root * math.copysign(1.0, self.scaling))
        self.lora_A.copy_(torch.cat(A_parts).view(self.lora_A.shape))
        self.lora_B.copy_(torch.cat(B_parts).view(self.lora_B.shape))

    # --- the factors as matrices -----------------------------------------------------------------

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A (R, in) and B (out, R) of the whole layer, with ``delta W = scaling * B A``."""
        A, B = self.lora_A, self.lora_B
        if self.slices:
            A, B = self.form.all_rows(A, B)
        if self.initial_A is not None and self.initial_B is not None:
            A0, B0 = self.form.all_rows(self.initial_A, self.initial_B)
            A, B = in_each_group(A, A0, self.form.groups), torch.cat([B, -B0], dim=1)
        return A, B

    def _rows(self) -> Tensor:
        """Return the indices of the adapted output rows, slice after slice."""
        if not self.slices:
            return torch.arange(self.out_features, device=self.lora_B.device)
        return self.form.rows(self.lora_B.device)

    # --- effect ----------------------------------------------------------------------------------

    def low_rank(self) -> LowRank | None:
        drops = self.training and self.dropout
        if (
            not self.is_product
            or drops
            or self.magnitude is not None
            or self.lora_B_bias is not None
        ):
            return None
        return LowRank(*self.factors(), self.scaling)

    def adapt(self, layer: nn.Module, x: Tensor, output: Tensor, weight: float) -> Tensor:
        """Return ``output + weight * scaling * (B A x + b)``, or the output with DoRA's magnitudes."""
        if self.magnitude is not None:
            require_data(self.lora_A, x)
            return self.adapt_rows(layer, x, output, self.row_factors(layer))
        A, B = self.factors()
        require_data(A, x)
        output = output + (weight * self.scaling) * self.branch(layer, self.drop(x), A, B)
        return self._add_bias(output, weight)

    def row_factors(self, layer: nn.Module) -> Tensor:
        """Return DoRA's factor on each row of the output, ``m / ||W + dW||``, shape (out,), in float32 or wider.

        The norm is a constant for the gradient (Liu et al. 2024, section 4.3).
        """
        A, B = self.factors()
        norms, rows = self.merged_norms(layer, A.detach(), B.detach()), self._rows()
        return self._row_factors(norms[rows], rows)

    def _row_factors(self, norms: Tensor, rows: Tensor) -> Tensor:
        """Return `row_factors` from the norms and indices of the adapted rows; other rows have the factor 1."""
        assert self.magnitude is not None
        factors = dora_factor(self.magnitude.to(norms.dtype), norms)
        return norms.new_ones(self.out_features).index_copy(0, rows, factors)

    def adapt_rows(self, layer: nn.Module, x: Tensor, output: Tensor, factors: Tensor) -> Tensor:
        """Return DoRA's output ``factors * (W + dW) x + b``, with the `row_factors` of the layer."""
        A, B = self.factors()
        shape = self.output_shape(output)
        # Near 1, bfloat16 has steps of 0.004 to 0.008: a rounded factor would scale all tokens wrongly. Its difference
        # from 1 is rounded far less.
        excess = (factors - 1).to(output.dtype).view(shape)
        change = self.branch(layer, self.drop(x), A, B)
        total = torch.add(output, change, alpha=self.scaling)
        bias = getattr(layer, "bias", None)
        # Under autocast the bias is wider than the output.
        product = total if bias is None else total - bias.to(output.dtype).view(shape)
        return torch.addcmul(total, excess, product)

    def _add_bias(self, output: Tensor, weight: float) -> Tensor:
        """Return the layer's output with the scaled bias of B added, if it has one."""
        if self.lora_B_bias is None:
            return output
        bias = self.form.bias_of_all_rows(self.lora_B_bias, self.lora_B)
        bias = bias.to(output.dtype).view(self.output_shape(output))
        return torch.add(output, bias, alpha=weight * self.scaling)

    def drop(self, x: Tensor) -> Tensor:
        """Apply dropout to the branch's input; the frozen layer gets `x` without dropout."""
        return dropout(x, self.dropout) if self.training and self.dropout else x

    def output_shape(self, output: Tensor) -> tuple[int, ...]:
        """Return the shape in which one number per output row broadcasts against the layer's output."""
        return (-1,)

    def row_norms(self, layer: nn.Module) -> Tensor:
        """Return the Euclidean norm of each row of W, in float32 or wider."""
        W = self.weight_matrix(layer)
        return torch.linalg.vector_norm(W.to(wide_dtype(W)), dim=1)

    def merged_norms(self, layer: nn.Module, A: Tensor, B: Tensor) -> Tensor:
        """Return the Euclidean norm of each row of ``W + scaling * B A``, in float32 or wider."""
        W = self.weight_matrix(layer)
        A, B = A.to(wide_dtype(W)), B.to(wide_dtype(W))
        with no_autocast(W):
            # The rows of different groups have different A, and vmap has no in-place product.
            if self.form.groups > 1 or is_transformed(W, A, B):
                merged = W.to(A.dtype) + self.scaling * self._product(A, B)
                return torch.linalg.vector_norm(merged, dim=1)
            A, B = A.flatten(1), B.flatten(1)  # of a convolution
            numbers = _CHUNK if W.device.type == "cpu" else _LARGE_CHUNK
            rows = max(1, numbers // max(1, W.shape[1]))
            norms = []
            for W_part, B_part in zip(W.split(rows), B.split(rows), strict=True):
                # A copy keeps the layout of W, and so the order of a row's sum.
                merged = W_part.to(A.dtype, copy=True).addmm_(B_part, A, alpha=self.scaling)
                norms.append(torch.linalg.vector_norm(merged, dim=1))
            return torch.cat(norms)

    # --- merging ---------------------------------------------------------------------------------

    def delta_matrix(self) -> Tensor:
        """Return ``scaling * B A`` in float32 (or wider), shape (out, in)."""
        A, B = self.factors()
        dtype = wide_dtype(A, B)
        return self._product(A.to(dtype), B.to(dtype)) * self.scaling

    def _product(self, A: Tensor, B: Tensor) -> Tensor:
        """Return ``B A`` as an (out, in) matrix, group by group."""
        A, B, groups = A.flatten(1), B.flatten(1), self.form.groups
        if groups == 1:
            return B @ A
        # G groups, R rows of A of a group, O outputs of a group, K inputs of a group times kernel elements.
        A_GRK, B_GOR = A.unflatten(0, (groups, -1)), B.unflatten(0, (groups, -1))
        return (B_GOR @ A_GRK).flatten(0, 1)

    def _as_weight(self, matrix: Tensor, layer: nn.Module) -> dict[str, Tensor]:
        """Return an (out, in) matrix in the layout of the layer's weight, by the weight's name."""
        name = self.form.weight_name
        return {name: self.form.weight(matrix, getattr(layer, name).shape)}

    def changed_weights(self, layer: nn.Module) -> list[str]:
        has_bias = self.lora_B_bias is not None and layer.bias is not None
        return [self.form.weight_name, *(["bias"] if has_bias else [])]

    def delta_weights(self, layer: nn.Module) -> dict[str, Tensor]:
        deltas = self._as_weight(self.delta_matrix(), layer)
        if self.lora_B_bias is not None:
            bias = self.form.bias_of_all_rows(self.lora_B_bias, self.lora_B)
            deltas["bias"] = bias.to(wide_dtype(bias)) * self.scaling
        return deltas

    def merged_weights(self, layer: nn.Module) -> dict[str, Tensor] | None:
        if self.magnitude is None:
            return None
        W = self.weight_matrix(layer)
        merged = W.to(wide_dtype(W)) + self.delta_matrix().to(wide_dtype(W))
        rows = self._rows()
        norms = torch.linalg.vector_norm(merged.detach()[rows], dim=1)
        return self._as_weight(self._row_factors(norms, rows)[:, None] * merged, layer)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scaling={self.scaling:g}, kind={self.form.kind}"


def output_is_unshared(layer: nn.Module) -> bool:
    """Return whether no code but the adapter's hook can hold the layer's output: no other hook or cache saw it."""
    return (
        type(layer).forward in _NEW_TENSOR
        and "forward" not in layer.__dict__
        and len(layer._forward_hooks) == 1
        and not _global_forward_hooks
        and not caches_outputs()
    )


def dora_factor(magnitude: Tensor, norms: Tensor) -> Tensor:
    """Return DoRA's factor on each row of the weight: magnitude / norm, and 1 for a row of zeros (PEFT has NaN)."""
    is_zero = norms == 0
    return torch.where(is_zero, 1, magnitude / norms.masked_fill(is_zero, 1))


def unsupported(layer: nn.Module, option: str) -> ConfigurationError:
    """Return the error for an option that a layer type does not support."""
    return ConfigurationError(
        f"{option} cannot be used on {type_name(layer)}. Remove it or choose other targets."
    )
