"""Compare the products of `W + scale * L R` with those of the sum."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.ops.low_rank_sum import LowRankSum, concatenated

EXPERTS, OUT, IN, RANK, SCALE = 4, 24, 32, 3, -0.5
IDS = torch.tensor([0, 2, 2, 1, 3])
ENDS = torch.tensor([3, 3, 7, 10], dtype=torch.int32)
"""Numbers of tokens up to each expert; the second has none."""


def factors(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (EXPERTS, OUT, IN), (EXPERTS, OUT, RANK), (EXPERTS, RANK, IN)
    drawn = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [t.to(dtype).requires_grad_(i > 0) for i, t in enumerate(drawn)]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


AS_PRODUCTS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda W: F.linear(random(5, IN), W[1]),
    "linear with an index that is a tensor": lambda W: F.linear(random(5, IN), W[IDS[1]]),
    "linear by name": lambda W: F.linear(weight=W[1], input=random(5, IN)),
    "a vector and a matrix": lambda W: random(OUT) @ W[1] @ random(IN),
    "linear with a bias": lambda W: F.linear(random(5, IN), W[1], random(OUT)),
    "matmul of a transposed matrix": lambda W: random(5, IN) @ W[1].mT,
    "matmul on the left": lambda W: W[1] @ random(IN, 5),
    "all experts at once": lambda W: torch.bmm(random(EXPERTS, 5, OUT), W),
    "an expert for each token": lambda W: torch.bmm(W[IDS], random(5, IN, 1)),
    "transposed": lambda W: torch.matmul(random(EXPERTS, 5, IN), W.transpose(1, 2)),
}
AS_SUM: dict[str, Callable[[Tensor], Tensor]] = {
    "einsum": lambda W: torch.einsum("eoi,ti->eto", W, random(5, IN)),
    "rows": lambda W: W[1, :3],
    "a slice": lambda W: W[1:3],
    "other dimensions transposed": lambda W: W.transpose(0, 1),
    "two of them": lambda W: W[0] @ W[1].mT,
    "a list": lambda W: torch.stack([W[0], W[1]]),
    "another dtype": lambda W: W.to(torch.float32),
    "arithmetic": lambda W: 2 * W + 1,
    "unbind": lambda W: W.unbind(0)[2],
    "a vector and the stack": lambda W: random(OUT) @ W,
    "the stack and a vector": lambda W: W @ random(IN),
    "a name that is not known": lambda W: torch.bmm(W[IDS], mat2=random(5, IN, 1)),
    "a mask": lambda W: W[torch.tensor([True, False, True, False])],
    "a mask of rows": lambda W: W[torch.ones(EXPERTS, OUT, dtype=torch.bool)],
}


def compared(
    use: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Tensor], list[Tensor], int]:
    """Return the result and gradients with the sum as a tensor and as computed, and how often it was computed."""
    computed = 0
    dense = LowRankSum.dense

    def counted(total: LowRankSum) -> Tensor:
        nonlocal computed
        computed += 1
        return dense(total)

    monkeypatch.setattr(LowRankSum, "dense", counted)
    found = []
    for lazily in (True, False):
        W, L, R = factors()
        total = LowRankSum(W, L, R, SCALE) if lazily else W + SCALE * (L @ R)
        result = use(total)
        assert type(result) is Tensor
        result.sin().sum().backward()
        found.append([result, L.grad, R.grad])
    return found[0], found[1], computed


@pytest.mark.parametrize("use", AS_PRODUCTS.values(), ids=[*AS_PRODUCTS])
def test_products_without_the_sum(use, monkeypatch):
    ours, expected, computed = compared(use, monkeypatch)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    assert computed == 0


@pytest.mark.parametrize("use", AS_SUM.values(), ids=[*AS_SUM])
def test_other_operations_get_the_sum(use, monkeypatch):
    ours, expected, computed = compared(use, monkeypatch)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    assert computed > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_products(dtype, transposed, monkeypatch):
    """`grouped_mm` has no float64, and its rows must be multiples of 16 bytes, which this rank is not."""
    monkeypatch.setattr(LowRankSum, "dense", lambda total: pytest.fail("it was computed"))
    W, L, R = factors(dtype)
    total = LowRankSum(W, L, R, SCALE)
    x = random(int(ENDS[-1]), OUT if transposed else IN).to(dtype).requires_grad_()
    result = F.grouped_mm(x, total if transposed else total.transpose(-2, -1), offs=ENDS)
    gradient = random(*result.shape)
    result.backward(gradient.to(dtype))

    exact = [t.detach().double().requires_grad_() for t in (x, L, R)]
    summed = W.double() + SCALE * (exact[1] @ exact[2])
    starts = [0, *ENDS.tolist()]
    parts = [
        exact[0][a:b] @ (summed[i] if transposed else summed[i].mT)
        for i, (a, b) in enumerate(itertools.pairwise(starts))
    ]
    expected = torch.cat(parts)
    expected.backward(gradient.to(dtype).double())
    # Two rounded products of about 30 numbers of size 1, and their rounded sum.
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip((x.grad, L.grad, R.grad), (t.grad for t in exact), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=5 * tolerance)


def test_what_it_says_of_itself():
    W, L, R = factors(torch.float32)
    total = LowRankSum(W, L.double(), R.double(), SCALE)
    assert isinstance(total, Tensor)
    assert (total.shape, total.ndim, total.dtype, total.device) == (W.shape, 3, W.dtype, W.device)
    rounded_once = (W.double() + SCALE * (L.double() @ R.double())).float()
    torch.testing.assert_close(total.dense(), rounded_once, rtol=0, atol=0)


def test_the_sum_outlives_a_look_at_its_memory():
    W, L, R = factors()
    total = LowRankSum(W, L, R, SCALE)
    with torch.no_grad():
        address = total.data_ptr()
        assert address == total.dense().data_ptr()
    assert total.dense().requires_grad  # the one without gradients is not used again


def test_the_sum_is_not_rounded_under_autocast():
    W, L, R = factors(torch.float32)
    total = LowRankSum(W, L, R, SCALE)
    with torch.autocast("cpu", torch.bfloat16):
        found = total + 0
    torch.testing.assert_close(found, W + SCALE * (L @ R))


def test_several_products_are_one():
    W, L, R = factors()
    pairs = [(L, R, 2.0), (L.flip(0), R.flip(0), -0.25)]
    expected = W + 2 * L @ R - 0.25 * (L.flip(0) @ R.flip(0))
    torch.testing.assert_close(LowRankSum(W, *concatenated(pairs)).dense(), expected)
    assert concatenated(pairs[:1]) is pairs[0]
