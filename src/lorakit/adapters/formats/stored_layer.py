"""One layer in an adapter file: its tensors and their meaning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from lorakit.adapters.tensor_checks import check_tensor
from lorakit.configuration import is_finite
from lorakit.errors import AdapterFileError, LorakitError
from lorakit.methods.lora.forms import (
    AttentionForm,
    ConvForm,
    EmbeddingForm,
    ExpertsForm,
    FactorForm,
    LinearForm,
)
from lorakit.models.layers import RowSlice

KINDS = tuple(
    form.kind for form in (LinearForm, EmbeddingForm, ConvForm, AttentionForm, ExpertsForm)
)

LAYER_ATTRIBUTES = {
    **{"A": "lora_A", "B": "lora_B", "B_bias": "lora_B_bias"},
    **{name: name for name in ("magnitude", "initial_A", "initial_B")},
}
"""Attribute of a `LoRALayer` with the same tensor, by field of a `StoredLayer`."""

TENSORS = (*LAYER_ATTRIBUTES, "base_norms")
"""Fields of a `StoredLayer` that hold its tensors."""


@dataclass(kw_only=True)
class StoredLayer:
    """One adapter on one layer: ``delta W = scaling * (B A - B0 A0)``, and ``scaling * B_bias`` on its bias.

    A0 and B0 are `initial_A` and `initial_B`, which only PiSSA has. `FactorForm` documents `slices`,
    `grouped` and `transposed`, and its module the shapes of A and B on each kind of layer.

    Raises:
        AdapterFileError: Shapes disagree, a number is not finite, or the adapter has no effect.
    """

    kind: str
    """One of `KINDS`."""
    A: Tensor
    B: Tensor
    scaling: float
    alpha: float
    B_bias: Tensor | None = None
    """The bias of B (`LoRA.lora_bias`), one number for each row of B, (rows,)."""
    magnitude: Tensor | None = None
    """DoRA's magnitudes, one for each row of B, (rows,)."""
    slices: tuple[RowSlice, ...] = ()
    initial_A: Tensor | None = None
    initial_B: Tensor | None = None
    """PiSSA's A0 and B0, the values of A and B before training; shaped as A and B."""
    base_norms: Tensor | None = None
    """DoRA on slices: the norms of all rows of the base weight, (out,), for export to PEFT. PEFT has a magnitude
    for every row; with its base norm as magnitude, a row outside the slices stays unchanged. The norms of rows in
    the slices are never read."""
    grouped: bool = True
    transposed: bool = False
    tied_head: str | None = None
    """embedding: path of the output head on which the same factors act, transposed."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise AdapterFileError(
                f"the kind of layer is {self.kind!r}; it must be one of {', '.join(KINDS)}."
            )
        for name, value in (("scaling", self.scaling), ("alpha", self.alpha)):
            if not is_finite(value) or value == 0:
                raise AdapterFileError(
                    f"{name} is {value!r}, so the adapter would have no (or no finite) effect. "
                    "The file is damaged, or it was written with a wrong alpha."
                )
        self.scaling, self.alpha = float(self.scaling), float(self.alpha)
        for name, tensor in self.tensors.items():
            check_tensor(name, tensor)
        self._check_shapes()

    @property
    def form(self) -> FactorForm:
        """The form of A and B on this kind of layer."""
        match self.kind:
            case LinearForm.kind:
                return LinearForm(slices=self.slices, transposed=self.transposed)
            case AttentionForm.kind:
                return AttentionForm(slices=self.slices)
            case EmbeddingForm.kind:
                return EmbeddingForm()
            case ConvForm.kind:
                return ConvForm(groups=self._groups(), grouped=self.grouped)
            case _:
                return ExpertsForm(groups=self._groups(), transposed=self.transposed)

    @property
    def rank(self) -> int:
        """Rank of the adapter; of each slice, for a fused projection."""
        return self.form.rank(self.A)

    @property
    def groups(self) -> int:
        """Groups of the convolution that a "conv" layer adapts; number of experts of an "experts" layer."""
        return self.form.groups

    @property
    def is_stacked(self) -> bool:
        """Whether the layer is a stacked weight of experts."""
        return self.kind == ExpertsForm.kind

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The layer's tensors by field name."""
        return {name: getattr(self, name) for name in TENSORS if getattr(self, name) is not None}

    def _groups(self) -> int:
        """Return the number of groups: A has the rank's rows for each of them, and B only the rank's columns."""
        are_matrices = min(self.A.ndim, self.B.ndim) > 1 and self.B.shape[1]
        return max(1, self.A.shape[0] // self.B.shape[1]) if are_matrices else 1

    def _check_shapes(self) -> None:
        form = self.form
        required = form.required_shapes(self.A, self.B)
        if required is not None:
            raise AdapterFileError(
                f"A has shape {tuple(self.A.shape)} and B has shape {tuple(self.B.shape)}; a {self.kind} layer "
                f"needs {required}."
            )
        if self.slices != form.slices:
            raise AdapterFileError(f"a {self.kind} layer cannot be adapted by slices of its rows.")
        if self.slices:
            rows = form.rows()
            one_layer = len({s.groups * s.stride for s in self.slices}) == 1
            if not one_layer or rows.unique().numel() < len(rows):
                raise AdapterFileError(
                    f"the slices {', '.join(map(str, self.slices))} overlap, or are of different layers."
                )
        if self.B_bias is not None and not form.supports_bias:
            raise AdapterFileError(
                f"B of a layer of kind {self.kind!r} cannot have a bias (lora_bias)."
            )
        expected_shapes = {
            "B_bias": (self.B.shape[0],),
            "magnitude": (self.B.shape[0],),
            "initial_A": tuple(self.A.shape),
            "initial_B": tuple(self.B.shape),
            "base_norms": (form.out_features(self.B),) if self.slices else None,
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
        if layer.form.limits_rank
        and layer.rank
        > (
            width := min(
                layer.A.shape[1], len(layer.B) // layer.groups, *(s.total for s in layer.slices)
            )
        )
    ]
    if not too_high:
        return []
    return [
        f"The rank exceeds the layer's width in {len(too_high)} layers, the first {too_high[0]}. "
        "The adapter works, but a smaller rank represents the same delta."
    ]
