"""Segmented low-rank products equal `lora_linear` on each segment alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorakit.ops.lora_linear import lora_linear
from lorakit.ops.lora_segments import Segment, lora_segments

N, IN, OUT = 7, 6, 5
TIGHT = {"rtol": 1e-12, "atol": 1e-13}


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, list[Segment]]:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, requires_grad=True)

    segments = [
        Segment(slice(1, 3), random(2, IN), random(OUT, 2), 0.5),
        Segment(torch.tensor([0, 4, 6]), random(3, IN), random(OUT, 3), -2.0),
        Segment(torch.tensor([4, 6]), random(1, IN), random(OUT, 1), 1.5),  # a blend of two
    ]
    return random(N, IN), random(N, OUT), segments


def by_hand(x: Tensor, out: Tensor, segments: list[Segment]) -> Tensor:
    rows = list(out)
    for tokens, A, B, scaling in segments:
        for i in torch.arange(N)[tokens].tolist():
            rows[i] = rows[i] + scaling * (x[i] @ A.T @ B.T)
    return torch.stack(rows)


@pytest.mark.parametrize("gradients", [True, False])
def test_forward(gradients: bool) -> None:
    x, out, segments = inputs()
    before = out.clone()
    with torch.set_grad_enabled(gradients):
        actual = lora_segments(x, out, segments)
    torch.testing.assert_close(actual, by_hand(x, out, segments), **TIGHT)
    assert torch.equal(out, before)
    assert torch.equal(actual[[3, 5]], out[[3, 5]])


def test_backward() -> None:
    x, out, segments = inputs()
    tensors = [x, out, *(t for s in segments for t in (s.A, s.B))]
    actual = torch.autograd.grad(lora_segments(x, out, segments).tanh().sum(), tensors)
    expected = torch.autograd.grad(by_hand(x, out, segments).tanh().sum(), tensors)
    torch.testing.assert_close(actual, expected, **TIGHT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_segment_is_the_plain_product(dtype: torch.dtype) -> None:
    x, out, _ = inputs(dtype)
    A, B = torch.randn(2, IN, requires_grad=True), torch.randn(OUT, 2, requires_grad=True)
    everything = [Segment(slice(0, N), A, B, 0.5)]
    actual = lora_segments(x, out, everything)
    expected = lora_linear(x, out, A, B, 0.5, in_place=False)
    assert torch.equal(actual, expected)
    upstream = torch.randn_like(out)
    for left, right in zip(
        torch.autograd.grad(actual, (x, out, A, B), upstream),
        torch.autograd.grad(expected, (x, out, A, B), upstream),
        strict=True,
    ):
        assert torch.equal(left, right)


def test_only_what_needs_a_gradient_gets_one() -> None:
    x, out, segments = inputs()
    frozen = [Segment(s.tokens, s.A.detach(), s.B, s.scaling) for s in segments]
    total = lora_segments(x.detach(), out.detach(), frozen).sum()
    total.backward()
    assert x.grad is None
    assert segments[0].A.grad is None
    assert segments[0].B.grad is not None


@pytest.mark.parametrize("segmented", [True, False])
def test_second_derivative(segmented: bool) -> None:
    """A gradient penalty: PyTorch would give no gradient, without an error, to a function that has none."""
    x, out, segments = inputs()
    if not segmented:
        segments = [Segment(slice(0, N), segments[0].A, segments[0].B, 0.5)]
    tensors = [x, *(t for s in segments for t in (s.A, s.B))]

    def penalties(total: Tensor) -> tuple[Tensor, ...]:
        (gradient,) = torch.autograd.grad(total[:, 1].sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), tensors, materialize_grads=True)

    if segmented:
        actual = penalties(lora_segments(x, out, segments))
    else:
        _, A, B, scaling = segments[0]
        actual = penalties(lora_linear(x, out, A, B, scaling, in_place=False))
    torch.testing.assert_close(actual, penalties(by_hand(x, out, segments)), **TIGHT)
    assert all(gradient.abs().max() > 0 for gradient in actual[1:3])
