"""Factors in PEFT's form: the same delta."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import hypothesis.strategies as st
import peft
import pytest
import torch
from at_rest import (
    contiguous,
    convolution,
    delta,
    embedding,
    fused,
    interleaved,
    linear,
    with_dora,
    with_start,
)
from hypothesis import given, settings
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from lorakit.adapters.formats.peft.factors import (
    NotExpressibleError,
    to_peft,
)
from lorakit.adapters.formats.peft.writing import _alpha, target_modules
from lorakit.adapters.formats.stored_layer import StoredLayer
from lorakit.models.layers import RowSlice

LAYERS = {
    "linear": linear(),
    "linear-pissa": with_start(linear()),
    "linear-dora": with_dora(linear()),
    "embedding": embedding(),
    "embedding-pissa": with_start(embedding()),
    "embedding-dora": with_dora(embedding()),
    "attention": linear(8, 24, kind="attention"),
    "fused-qv": fused(*contiguous(4, 0, 2)),
    "fused-k": fused(*contiguous(4, 1)),
    "fused-unequal": fused(
        RowSlice(groups=1, stride=16, offset=0, width=8),
        RowSlice(groups=1, stride=16, offset=12, width=4),
    ),
    "fused-interleaved": fused(*interleaved(3, 4, 0, 2)),
    "fused-pissa": with_start(fused(*contiguous(4, 0, 2))),
    "fused-dora": with_dora(fused(*interleaved(3, 4, 0, 2))),
    "conv1d": convolution(kernel=(5,)),
    "conv2d-pissa": with_start(convolution(kernel=(3, 2))),
    "conv2d-dora": with_dora(convolution()),
    "conv3d": convolution(kernel=(2, 2, 2)),
    "conv-grouped": convolution(rank=4, groups=2),
    "conv-grouped-pissa": with_start(convolution(rank=4, groups=2)),
    "conv-grouped-as-peft": convolution(rank=4, groups=2, grouped=False),
    "conv-depthwise": convolution(n_in=6, n_out=6, rank=6, groups=6),
}
each_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)


def peft_product(layer: StoredLayer, factors: StoredLayer) -> Tensor:
    """The delta that PEFT computes: B after A, each as the layer that PEFT creates."""
    A, B = factors.A.double(), factors.B.double()
    if A.ndim == 2:
        return B @ A
    convolve = {3: nn.functional.conv1d, 4: nn.functional.conv2d, 5: nn.functional.conv3d}[A.ndim]
    # The response to a unit impulse at each input channel and tap is the kernel.
    size = A[0, 0].numel()
    impulses = torch.eye(A.shape[1] * size).double().view(-1, A.shape[1], *A.shape[2:])
    hidden = (impulses.flatten(1) @ A.flatten(1).T).view(-1, A.shape[0], *(1 for _ in A.shape[2:]))
    out = convolve(hidden, B, groups=layer.groups)
    return out.flatten(1).T.view(B.shape[0], *A.shape[1:])


@each_layer
def test_the_delta_is_the_same(layer: StoredLayer):
    check_delta(layer)


def check_delta(layer: StoredLayer) -> None:
    factors = to_peft(layer)
    expected = delta(layer)
    assert expected.abs().max() > 0.1
    found = layer.scaling * peft_product(layer, factors)
    torch.testing.assert_close(found.view(expected.shape), expected, rtol=1e-12, atol=1e-12)


def test_magnitudes_of_other_rows_are_the_base_norms():
    layer = LAYERS["fused-dora"]
    assert layer.magnitude is not None
    assert layer.base_norms is not None
    whole = to_peft(layer).magnitude
    assert whole is not None
    rows = torch.cat([s.rows() for s in layer.slices])
    others = [r for r in range(len(whole)) if r not in rows.tolist()]
    assert torch.equal(whole[rows], layer.magnitude)
    assert torch.equal(whole[others], layer.base_norms[others])
    assert len(others) == 12


def test_what_peft_cannot_say():
    layer = with_dora(fused(*contiguous(4, 0, 2)))
    layer.base_norms = None
    with pytest.raises(NotExpressibleError, match="norms of the base's other rows"):
        to_peft(layer)
    with pytest.raises(NotExpressibleError, match="no DoRA for grouped"):
        to_peft(with_dora(convolution(rank=4, groups=2)))


@st.composite
def fused_layers(draw: st.DrawFn) -> StoredLayer:
    groups, stride = draw(st.integers(1, 4)), draw(st.integers(2, 9))
    cuts = sorted(draw(st.sets(st.integers(0, stride), min_size=2, max_size=5)))
    pieces = [
        RowSlice(groups=groups, stride=stride, offset=a, width=b - a)
        for a, b in itertools.pairwise(cuts)
    ]
    chosen = draw(st.lists(st.sampled_from(pieces), min_size=1, unique=True))
    layer = fused(*chosen, n_in=draw(st.integers(1, 5)), rank=draw(st.integers(1, 3)))
    layer = with_start(layer) if draw(st.booleans()) else layer
    return with_dora(layer) if draw(st.booleans()) else layer


@settings(max_examples=60)
@given(fused_layers())
def test_any_slices_give_the_same_delta(layer: StoredLayer):
    check_delta(layer)


@given(
    rank=st.integers(1, 300),
    multiple=st.sampled_from([1, 2, 3, 4, 6]),
    alpha=st.one_of(
        st.integers(1, 10_000).map(float), st.floats(1e-3, 1e3, allow_nan=False), st.just(-16.0)
    ),
    rslora=st.booleans(),
)
def test_pefts_scaling_is_ours(rank: int, multiple: int, alpha: float, rslora: bool):
    scaling = alpha / math.sqrt(rank) if rslora else alpha / rank
    wide = replace(linear(1, 1, rank=rank * multiple), scaling=scaling, alpha=alpha * multiple)
    found = _alpha(wide) / wide.rank
    assert abs(found - scaling) <= math.ulp(scaling)
    assert torch.tensor(found, dtype=torch.float32) == torch.tensor(scaling, dtype=torch.float32)
    if not rslora and alpha.is_integer():
        assert found == scaling


@pytest.mark.parametrize(
    ("targets", "modules", "expected"),
    [
        (
            ["h.0.q_proj", "h.1.q_proj"],
            ["h", "h.0", "h.1", "h.0.q_proj", "h.1.q_proj", "h.0.k_proj"],
            ["q_proj"],
        ),
        (["h.0.q", "h.2.q"], ["h.0.q", "h.1.q", "h.2.q", "h.10.q"], ["0.q", "2.q"]),
        (["h.2.q", "h.10.q"], None, ["h.2.q", "h.10.q"]),
        (["a.x.q", "b.q"], ["a.x.q", "b.q", "b.x.q"], ["a.x.q", "b.q"]),
        (["0"], ["0", "1", "1.0"], "0"),
    ],
)
def test_target_modules_are_the_shortest_names(targets, modules, expected):
    assert target_modules(targets, modules) == expected


@given(st.data())
def test_target_modules_hit_the_targets_alone(data: st.DataObject):
    part = st.sampled_from(["a", "b", "0", "1", "a.b", "0.a"])
    path = st.lists(part, min_size=1, max_size=3).map(".".join)
    modules = data.draw(st.lists(path, min_size=1, max_size=12, unique=True))
    targets = data.draw(st.lists(st.sampled_from(modules), min_size=1, unique=True))
    config = peft.LoraConfig(target_modules=target_modules(targets, modules))
    found = {path for path in modules if check_target_module_exists(config, path)}
    assert found == set(targets)
