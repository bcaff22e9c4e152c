"""Fast dropout: the share dropped, the scale factor, independent draws, and reproducibility from torch's seed."""

import pytest
import torch

from lorakit.ops.dropout import STEPS, dropout, keep_mask, multiplier


@pytest.mark.parametrize("p", [0.001, 0.05, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_share_and_factor(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(1000, 400, dtype=dtype)
    y = dropout(x, p)
    dropped = (y == 0).float().mean().item()
    deviation = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(dropped - p) < 5 * deviation + 1 / STEPS
    kept = y[y != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - p)), rtol=4e-3, atol=0)


@pytest.mark.parametrize("p", [1e-9, 1.0])
def test_probabilities_at_the_ends(p):
    x = torch.ones(2000)
    kept = multiplier(keep_mask(x, p), p, x.dtype).count_nonzero()
    assert kept == 0 if p == 1 else kept > 1990
    assert torch.equal(dropout(x, 0.0), x)


def test_gradient_is_that_of_the_drawn_mask():
    torch.manual_seed(0)
    x = torch.randn(50, 30, requires_grad=True)
    y = dropout(x, 0.3)
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(x.grad * x.detach(), y.detach())


def test_second_derivative():
    x = torch.randn(50, 30, requires_grad=True)
    (first,) = torch.autograd.grad(dropout(x, 0.3).square().sum() / 2, x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert second.any()
    torch.testing.assert_close(second * x, first)


def test_torchs_seed_and_state_decide():
    x = torch.ones(64, 64)
    torch.manual_seed(3)
    first = dropout(x, 0.5)
    state = torch.get_rng_state()
    second = dropout(x, 0.5)
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(dropout(x, 0.5), second)
    torch.manual_seed(3)
    assert torch.equal(dropout(x, 0.5), first)


def test_draws_are_independent_along_and_between_calls():
    torch.manual_seed(0)
    a, b = (dropout(torch.ones(200_000), 0.5) / 2 for _ in range(2))
    limit = 0.25 * 5 / 200_000**0.5
    along = [((a[lag:] - 0.5) * (a[:-lag] - 0.5)).mean().abs() for lag in (1, 2, 3, 4, 8)]
    between = ((a - 0.5) * (b - 0.5)).mean().abs()
    assert max(*along, between) < limit


def test_compiles():
    x = torch.ones(16, 16)
    compiled = torch.compile(lambda t: dropout(t, 0.5), backend="eager", fullgraph=True)
    assert set(compiled(x).unique().tolist()) <= {0.0, 2.0}
