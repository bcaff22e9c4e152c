"""One layer in an adapter file: its tensors and their meaning."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lorakit.errors import AdapterFileError, LorakitError
from lorakit.models.dtypes import FLOATS, dtype_name
from lorakit.models.roles import RowSlice

Kind = Literal["linear", "embedding", "conv", "conv-loralib", "attention"]
KINDS: tuple[str, ...] = Kind.__args__

TENSORS = ("A", "B", "magnitude", "initial_A", "initial_B", "base_norms")
"""Fields of a `StoredLayer` that hold its tensors."""


@dataclass(kw_only=True)
class StoredLayer:
    """One adapter on one layer: ``delta W = scaling * (B A - B0 A0)``.

    A0 and B0 are `initial_A` and `initial_B`, which only PiSSA has. By kind, with r the rank and K the kernel's
    width, A and B have these shapes:

    ============== ===================================== =======================================
    kind           A                                     B
    ============== ===================================== =======================================
    linear         (r, in)                               (out, r)
    attention      (r, embed_dim)                        (3 * embed_dim, r)
    embedding      (r, num_embeddings)                   (embedding_dim, r)
    conv           (r, in or in / groups, *kernel)       (out, r / groups, 1, ...)
    conv-loralib   (r * K, in * K)                       (out / groups * K, r * K)
    ============== ===================================== =======================================

    A linear or attention layer may be adapted by slices of its output rows. A then stacks r rows
    for each slice, (number of slices * r, in), and B the rows of the slices, (sum of widths, r).

    Raises:
        AdapterFileError: Shapes disagree, a number is not finite, or the adapter has no effect.
    """

    kind: Kind
    A: Tensor
    B: Tensor
    scaling: float
    alpha: float
    magnitude: Tensor | None = None
    """DoRA's magnitudes, one for each row of B, (rows,)."""
    slices: tuple[RowSlice, ...] = ()
    """The adapted output rows of a fused projection; empty means all rows."""
    initial_A: Tensor | None = None  # noqa: N815
    initial_B: Tensor | None = None  # noqa: N815
    """PiSSA's A0 and B0, the values of A and B before training; shaped as A and B."""
    base_norms: Tensor | None = None
    """DoRA on slices: the norms of all rows of the base weight, (out,), for export to PEFT. PEFT has a magnitude
    for every row; with its base norm as magnitude, a row outside the slices stays unchanged. The norms of rows in
    the slices are never read."""
    weight_shape: tuple[int, ...] | None = None
    """conv-loralib: shape of the layer's weight, (out, in / groups, K, K), if it is known."""
    grouped: bool = True
    """conv: whether A reads the input channels of one group; PEFT's A reads all input channels."""
    transposed: bool = False
    """linear: the base stores its weight as (in, out), as GPT-2's Conv1D does."""
    tied_head: str | None = None
    """embedding: path of the output head on which the same factors act, transposed."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise AdapterFileError(
                f"the kind of layer is {self.kind!r}; it must be one of {', '.join(KINDS)}."
            )
        for name, value in (("scaling", self.scaling), ("alpha", self.alpha)):
            if not math.isfinite(value) or value == 0:
                raise AdapterFileError(
                    f"{name} is {value!r}, so the adapter would have no (or no finite) effect. "
                    "The file is damaged, or it was written with a wrong alpha."
                )
        self.scaling, self.alpha = float(self.scaling), float(self.alpha)
        for name, tensor in self.tensors.items():
            check_tensor(name, tensor)
        self._check_factors()
        self._check_extras()

    @property
    def rank(self) -> int:
        """Rank of the adapter; of each slice, for a fused projection."""
        if self.kind == "conv-loralib":
            return self.A.shape[0] // self.kernel_width
        return self.A.shape[0] // max(1, len(self.slices))

    @property
    def groups(self) -> int:
        """Groups of the convolution that a "conv" layer adapts."""
        return self.A.shape[0] // self.B.shape[1] if self.kind == "conv" else 1

    @property
    def kernel_width(self) -> int:
        """K of a "conv-loralib" layer; loralib supports only square kernels and the scaling alpha / r."""
        if self.weight_shape is not None:
            return self.weight_shape[-1]
        # A has r * K rows, and scaling / alpha is 1 / r.
        return max(1, round(self.A.shape[0] * self.scaling / self.alpha))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The layer's tensors by field name."""
        return {name: getattr(self, name) for name in TENSORS if getattr(self, name) is not None}

    def as_loralib_conv(self, weight_shape: Iterable[int]) -> StoredLayer:
        """Return the same tensors as loralib's factors of a convolution with a weight of this shape.

        loralib's files do not distinguish convolutions from linear layers; only the model does.

        Raises:
            AdapterFileError: The factors do not fit the weight.
        """
        shape = tuple(weight_shape)
        scaling = self.alpha * shape[-1] / self.A.shape[0]
        return replace(self, kind="conv-loralib", weight_shape=shape, scaling=scaling)

    def _check_factors(self) -> None:
        A, B = self.A, self.B
        if self.kind == "conv":
            fits = 3 <= A.ndim <= 5 and B.ndim == A.ndim and B[0, 0].numel() == 1
            expected = "A (rank, in, *kernel) and B (out, rank / groups, 1, ...)"
            if fits:
                fits = A.shape[0] % B.shape[1] == 0 and B.shape[0] % self.groups == 0
        else:
            fits = A.ndim == B.ndim == 2
            expected = "A (rank, in) and B (out, rank)"
            if fits and self.slices:
                rows = sum(s.total for s in self.slices)
                expected = f"A ({len(self.slices)} * rank, in) and B ({rows}, rank)"
                fits = A.shape[0] % len(self.slices) == 0 and B.shape[0] == rows
            if fits and self.kind == "conv-loralib":
                K = self.kernel_width
                expected = f"A (rank * {K}, in * {K}) and B (out / groups * {K}, rank * {K})"
                fits = all(n % K == 0 for n in (*A.shape, B.shape[0]))
                if self.weight_shape is not None:
                    fits = fits and A.shape[1] * B.shape[0] == math.prod(self.weight_shape)
            if fits:
                factor = self.kernel_width if self.kind == "conv-loralib" else 1
                fits = B.shape[1] == self.rank * factor
        if not fits:
            raise AdapterFileError(
                f"A has shape {tuple(A.shape)} and B has shape {tuple(B.shape)}; a {self.kind} layer "
                f"needs {expected}."
            )

    def _check_extras(self) -> None:
        if self.slices and self.kind not in ("linear", "attention"):
            raise AdapterFileError(f"a {self.kind} layer cannot be adapted by slices of its rows.")
        if self.slices:
            rows = self.rows()
            one_layer = len({s.groups * s.stride for s in self.slices}) == 1
            if not one_layer or rows.unique().numel() < len(rows):
                raise AdapterFileError(
                    f"the slices {', '.join(map(str, self.slices))} overlap, or are of different layers."
                )
        if self.magnitude is not None and self.kind == "conv-loralib":
            raise AdapterFileError("loralib's convolution factors cannot have DoRA magnitudes.")
        expected_shapes = {
            "magnitude": (self.B.shape[0],),
            "initial_A": tuple(self.A.shape),
            "initial_B": tuple(self.B.shape),
            "base_norms": (self.slices[0].groups * self.slices[0].stride,) if self.slices else None,
        }
        for name, expected in expected_shapes.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != expected:
                raise AdapterFileError(
                    f"{name} has shape {tuple(tensor.shape)}; {expected or 'none'} was expected."
                )
        if (self.initial_A is None) != (self.initial_B is None):
            raise AdapterFileError(
                "one of initial_A and initial_B is missing; both or neither were expected."
            )

    def rows(self) -> Tensor:
        """Return the indices of the adapted rows of a fused projection, slice by slice."""
        return torch.cat([s.rows() for s in self.slices])


def check_tensor(name: str, tensor: Tensor) -> None:
    """Reject anything but a dense tensor of finite floating-point numbers.

    Raises:
        AdapterFileError: The tensor is sparse, quantised, empty, or holds NaN or infinity.
    """
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
        raise AdapterFileError(f"{name} is a {type(tensor).__name__}, not a dense tensor.")
    if tensor.dtype not in FLOATS:
        raise AdapterFileError(
            f"{name} holds {dtype_name(tensor.dtype)} numbers; "
            f"{', '.join(map(dtype_name, FLOATS))} can be read."
        )
    if tensor.numel() == 0:
        raise AdapterFileError(f"{name} is empty: its shape is {tuple(tensor.shape)}.")
    if not tensor.is_meta and not tensor.isfinite().all():
        wrong = int((~tensor.isfinite()).sum())
        raise AdapterFileError(
            f"{name} holds {wrong} values that are NaN or infinite. The training run diverged, or the "
            "file is damaged; use an earlier checkpoint."
        )


@contextmanager
def located(where: str) -> Iterator[None]:
    """Prefix an error's message with `where`, the file or layer; once, if nested blocks name the same."""
    try:
        yield
    except LorakitError as error:
        if str(error).startswith(where):
            raise
        raise type(error)(f"{where}: {error}") from error


def rank_notices(layers: Mapping[str, StoredLayer]) -> list[str]:
    """Return a notice if the rank of layers exceeds their width; such files still load."""
    too_high = [
        f"'{path}' (rank {layer.rank}, width {width})"
        for path, layer in layers.items()
        if layer.kind in ("linear", "attention", "embedding")
        and layer.rank > (width := min(layer.A.shape[1], layer.B.shape[0]))
    ]
    if not too_high:
        return []
    return [
        f"The rank exceeds the layer's width in {len(too_high)} layers, the first {too_high[0]}. "
        "The adapter works, but a smaller rank represents the same delta."
    ]
