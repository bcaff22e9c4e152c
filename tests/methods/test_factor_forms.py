"""The forms of A and B on each kind of layer, against a float64 computation entry by entry."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorakit
from lorakit.adapters import formats
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.adapters.formats.stored_layer import KINDS, StoredLayer, rank_notices
from lorakit.errors import AdapterFileError
from lorakit.methods.lora.forms import (
    AttentionForm,
    ConvForm,
    EmbeddingForm,
    ExpertsForm,
    FactorForm,
    LinearForm,
)
from lorakit.methods.lora.layer import LoRALayer
from lorakit.models.layers import RowSlice

Q, V = (
    RowSlice(groups=1, stride=12, offset=offset, width=width) for offset, width in ((0, 6), (9, 3))
)
HEADS = RowSlice(groups=3, stride=4, offset=1, width=2)


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same_bits(found: Tensor, expected: Tensor) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.contiguous().view(torch.uint8).equal(expected.contiguous().view(torch.uint8))


@dataclass(frozen=True)
class Case:
    """A form, fitting shapes of A and B, and the shape of the weight that the layer stores."""

    form: FactorForm
    A: tuple[int, ...]
    B: tuple[int, ...]
    weight: tuple[int, ...]
    rank: int
    matrix: tuple[int, int]
    wrong: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    """Shapes of A and B that do not fit."""
    needs: str
    """The shapes in the error's words."""

    def factors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        A, B = numbers(*self.A, seed=1, dtype=dtype), numbers(*self.B, seed=2, dtype=dtype)
        A.view(-1)[0] = B.view(-1)[0] = -0.0  # a conversion by arithmetic would lose the sign
        return A, B


PLAIN = "A (rank, in) and B (out, rank)"
EXPERTS = "A (experts * rank, in) and B (experts * out, rank)"
KERNEL = "A (rank, in, *kernel) and B (out, rank / groups, 1, ...)"
CASES = {
    "linear": Case(
        LinearForm(),
        *((2, 5), (7, 2), (7, 5), 2, (7, 5)),
        wrong=(((2, 5), (7, 3)), ((2, 5, 1), (7, 2)), ((2,), (7, 2)), ((), ())),
        needs=PLAIN,
    ),
    "conv1d": Case(
        LinearForm(transposed=True),
        *((2, 5), (7, 2), (5, 7), 2, (7, 5)),
        wrong=(((4, 5), (7, 2)),),
        needs=PLAIN,
    ),
    "fused": Case(
        LinearForm(slices=(Q, V)),
        *((4, 5), (9, 2), (12, 5), 2, (12, 5)),
        wrong=(((2, 5), (9, 2)), ((4, 5), (12, 2)), ((3, 5), (9, 1))),
        needs="A (2 * rank, in) and B (9, rank)",
    ),
    "interleaved": Case(
        LinearForm(slices=(HEADS,)),
        *((3, 5), (6, 3), (12, 5), 3, (12, 5)),
        wrong=(((3, 5), (5, 3)),),
        needs="A (1 * rank, in) and B (6, rank)",
    ),
    "attention": Case(
        AttentionForm(slices=(Q,)),
        *((2, 4), (6, 2), (12, 4), 2, (12, 4)),
        wrong=(((2, 4), (12, 2)),),
        needs="A (1 * rank, in) and B (6, rank)",
    ),
    "embedding": Case(
        EmbeddingForm(),
        *((2, 9), (5, 2), (9, 5), 2, (5, 9)),
        wrong=(((2, 9), (5, 3)), ((2, 9, 3), (5, 2, 1))),
        needs=PLAIN,
    ),
    "conv": Case(
        ConvForm(),
        *((2, 3, 3, 2), (5, 2, 1, 1), (5, 3, 3, 2), 2, (5, 18)),
        wrong=(((2, 3), (5, 2)), ((2, 3, 3, 2), (5, 2, 1, 2)), ((3, 3, 3), (5, 2, 1)), ((), ())),
        needs=KERNEL,
    ),
    "grouped conv": Case(
        ConvForm(groups=2),
        *((4, 3, 2), (6, 2, 1), (6, 3, 2), 4, (6, 6)),
        wrong=(((4, 3, 2), (5, 2, 1)), ((4, 3, 2), (6, 4, 1))),
        needs=KERNEL,
    ),
    "experts": Case(
        ExpertsForm(groups=3),
        *((6, 5), (12, 2), (3, 4, 5), 2, (12, 5)),
        wrong=(((2, 5), (12, 2)), ((6, 5), (11, 2)), ((6, 5, 1), (12, 2, 1)), ((), ())),
        needs=EXPERTS,
    ),
    "experts stored as (in, out)": Case(
        ExpertsForm(groups=3, transposed=True),
        *((6, 5), (12, 2), (3, 5, 4), 2, (12, 5)),
        wrong=(((6, 5), (12, 3)),),
        needs=EXPERTS,
    ),
}
each = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def change(case: Case, A: Tensor, B: Tensor) -> Tensor:
    """Return ``B A`` in the layout of the layer's weight, entry by entry in float64."""
    out = torch.zeros(case.weight, dtype=torch.float64)
    rank, pieces = case.rank, [rows_of(piece) for piece in case.form.slices]
    a, b = A.double(), B.double()
    for place in itertools.product(*map(range, case.weight)):
        if isinstance(case.form, ConvForm):
            o, *rest = place
            width = B.shape[1]
            first = o // (B.shape[0] // case.form.groups) * width
            out[place] = sum(b[o, r].item() * a[(first + r, *rest)] for r in range(width))
            continue
        if isinstance(case.form, ExpertsForm):
            expert, *at = place
            row, column = reversed(at) if case.form.transposed else at
            row += expert * (B.shape[0] // case.form.groups)
            out[place] = sum(b[row, r] * a[expert * rank + r, column] for r in range(rank))
            continue
        stored_as_in_out = case.weight != case.matrix
        row, column = reversed(place) if stored_as_in_out else place
        if not pieces:
            out[place] = sum(b[row, r] * a[r, column] for r in range(rank))
        for i, rows in enumerate(pieces):
            if row in rows:
                at = sum(map(len, pieces[:i])) + rows.index(row)
                out[place] = sum(b[at, r] * a[i * rank + r, column] for r in range(rank))
    return out


def rows_of(piece: RowSlice) -> list[int]:
    starts = [g * piece.stride + piece.offset for g in range(piece.groups)]
    return [start + j for start in starts for j in range(piece.width)]


@each
def test_shapes_are_accepted_and_rejected(case: Case):
    A, B = case.factors()
    assert case.form.required_shapes(A, B) is None
    assert case.form.rank(A) == case.rank
    for A_shape, B_shape in case.wrong:
        found = case.form.required_shapes(torch.empty(A_shape), torch.empty(B_shape))
        assert found == case.needs, (A_shape, B_shape)


@each
def test_the_parts_are_the_change_of_the_weight(case: Case):
    A, B = case.factors()
    expected = change(case, A, B)
    matrix = case.form.matrix(expected, case.matrix)
    assert tuple(matrix.shape) == case.matrix
    assert case.form.out_features(B) == case.matrix[0]
    wanted = case.form.weight_parts(matrix)
    found = [b.double() @ a.double() for a, b in case.form.parts(A, B)]
    assert len(found) == max(len(case.form.slices), case.form.groups)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@each
def test_a_matrix_becomes_the_weight_again(case: Case):
    weight = numbers(*case.weight)
    back = case.form.weight(case.form.matrix(weight, case.matrix), case.weight)
    assert back.is_contiguous()
    same_bits(back, weight)


@each
def test_pefts_pair_is_the_same_change(case: Case):
    A, B = case.factors()
    wide_A, wide_B = (t.flatten(1).double() for t in case.form.to_peft(A, B))
    groups = case.form.groups
    rank = len(wide_A) // groups
    rows = wide_B.shape[0] // groups
    found = torch.cat(
        [
            wide_B[g * rows : (g + 1) * rows] @ wide_A[g * rank : (g + 1) * rank]
            for g in range(groups)
        ]
    )
    expected = change(case, A, B)
    if isinstance(case.form, LinearForm | EmbeddingForm):
        expected = expected if case.weight == case.matrix else expected.T
    expected = expected.flatten(1)
    if isinstance(case.form, ExpertsForm):
        expected = case.form.matrix(change(case, A, B), case.matrix)
    elif groups > 1:  # PEFT's A reads all input channels, those of the other groups with zeros
        own = torch.block_diag(*[torch.ones(rows, expected.shape[1])] * groups).bool()
        assert not found[~own].any()
        found = found[own].view_as(expected)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_linear_weight_is_stored_in_either_order():
    square, wide = numbers(5, 5), numbers(5, 7)
    same_bits(LinearForm().matrix(square, (5, 5)), square)
    same_bits(LinearForm(transposed=True).matrix(square, (5, 5)), square.T)
    same_bits(LinearForm().matrix(wide, (5, 7)), wide)
    # A loralib file does not record the order, so the shape decides.
    same_bits(LinearForm().matrix(wide, (7, 5)), wide.T)
    same_bits(LinearForm().matrix(wide, (7, 4)), wide)
    stacked = numbers(2, 3, 5)  # and neither does one of PEFT
    same_bits(ExpertsForm(groups=2).matrix(stacked, (10, 3)), stacked.mT.flatten(0, 1))
    same_bits(ExpertsForm(groups=2).matrix(stacked, (6, 4)), stacked.flatten(0, 1))


def test_only_matrices_limit_the_rank():
    A, B = numbers(4, 3), numbers(2, 4)
    settings: dict[str, Any] = {"scaling": 1.0, "alpha": 4.0}
    for kind in ("linear", "attention", "embedding"):
        (notice,) = rank_notices({"a": StoredLayer(kind=kind, A=A, B=B, **settings)})
        assert "'a' (rank 4, width 2)" in notice
    slices = tuple(RowSlice(groups=1, stride=5, offset=o, width=w) for o, w in ((0, 3), (3, 2)))
    fused = StoredLayer(kind="linear", A=numbers(6, 8), B=numbers(5, 3), slices=slices, **settings)
    (notice,) = rank_notices({"a": fused})
    assert "'a' (rank 3, width 2)" in notice
    experts = StoredLayer(kind="experts", A=numbers(9, 8), B=numbers(6, 3), **settings)
    (notice,) = rank_notices({"a": experts})
    assert "'a' (rank 3, width 2)" in notice
    conv = StoredLayer(kind="conv", A=A[..., None], B=B[..., None], **settings)
    assert rank_notices({"a": conv}) == []


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_and_vectors_are_no_factors(kind: str):
    for shape in ((), (4,)):
        with pytest.raises(AdapterFileError, match=f"a {kind} layer needs A"):
            StoredLayer(kind=kind, A=torch.ones(shape), B=torch.ones(shape), scaling=1.0, alpha=1.0)


class Net(nn.Module):
    """One layer of each type."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.conv1d = Conv1D(4, 6)
        self.table = nn.Embedding(9, 4)
        self.mha = nn.MultiheadAttention(4, 2)
        self.conv = nn.Conv2d(4, 6, 3)
        self.grouped = nn.Conv1d(4, 6, 3, groups=2)


def test_live_and_stored_adapters_have_the_same_form():
    forms = {
        "linear": LinearForm(),
        "conv1d": LinearForm(transposed=True),
        "table": EmbeddingForm(),
        "mha": AttentionForm(),
        "mha.out_proj": LinearForm(),
        "conv": ConvForm(),
        "grouped": ConvForm(groups=2),
    }
    handle = lorakit.attach(Net(), lorakit.LoRA(rank=2, targets=tuple(forms)), name="a")
    assert live_forms(handle) == forms
    assert {path: layer.form for path, layer in handle.stored().layers.items()} == forms


def live_forms(handle: lorakit.Adapters) -> dict[str, FactorForm]:
    modules = handle.modules().items()
    return {path: module.form for path, module in modules if isinstance(module, LoRALayer)}


def stored(**layers: StoredLayer) -> StoredAdapter:
    return StoredAdapter(method=lorakit.LoRA(rank=2, targets=tuple(layers)), layers=layers)


def test_a_loaded_adapter_keeps_the_form_of_its_file(tmp_path: Path):
    A, B = (
        numbers(2, 4, 3),
        numbers(6, 1, 1),
    )  # as in PEFT's files, A reads the channels of all groups
    ungrouped = StoredLayer(kind="conv", A=A, B=B, scaling=1.0, alpha=2.0, grouped=False)
    formats.write(stored(grouped=ungrouped), tmp_path)
    handle = lorakit.load(Net(), tmp_path, name="a")
    expected = {"grouped": ConvForm(groups=2, grouped=False)}
    assert live_forms(handle) == expected
    assert {path: layer.form for path, layer in handle.stored().layers.items()} == expected
