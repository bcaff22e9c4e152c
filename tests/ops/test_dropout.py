"""Test fast dropout: the share dropped, the scale factor, reproducibility from torch's seed, and masks by keys."""

import pytest
import torch

from lorakit.ops.attention import masked_attention
from lorakit.ops.dropout import PERIOD, _thresholds, dropout


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_share_and_factor(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(1000, 400, dtype=dtype)
    y = dropout(x, p)
    dropped = (y == 0).float().mean().item()
    deviation = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(dropped - p) < 5 * deviation + 2**-19
    kept = y[y != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - p)), rtol=2e-3, atol=0)


@pytest.mark.slow
def test_every_element_has_the_same_probability():
    """The thresholds are 0 and 1 of 256; the random start of their pattern must hide it at every position."""
    torch.manual_seed(0)
    draws, p = 20_000, 1 / 512
    dropped = sum((dropout(torch.ones(50), p) == 0).double() for _ in range(draws)) / draws
    assert (dropped - p).abs().max() < 5 * (p * (1 - p) / draws) ** 0.5


def test_thresholds_are_the_probability_on_average():
    for dropped in (1, 1023, 1024, 26_214, 200_000, 255 * PERIOD):
        found = _thresholds(dropped).double()
        assert found[:PERIOD].mean() * PERIOD == dropped
        assert (found[:PERIOD] == found[PERIOD:]).all()


def test_a_probability_that_eight_bits_cannot_give():
    torch.manual_seed(0)
    y = dropout(torch.ones(1000, 1000), 0.999)
    assert 800 < (y != 0).sum() < 1200
    assert y.max().item() == pytest.approx(1000, rel=5e-3)


def test_attention_weights_may_all_be_dropped():
    q = k = v = torch.randn(1, 2, 4, 8)
    assert not masked_attention(q, k, v, scale=0.3, dropout=1.0).any()


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
    for lag in (1, 2, 3, 4, 7, 8):
        assert abs(((a[lag:] - 0.5) * (a[:-lag] - 0.5)).mean()) < 0.25 * 5 / 200_000**0.5
    assert abs(((a - 0.5) * (b - 0.5)).mean()) < 0.25 * 5 / 200_000**0.5


def test_gradient_checkpointing_draws_the_same_again():
    x = torch.randn(30, 20, requires_grad=True)
    torch.manual_seed(0)
    plain = dropout(x, 0.4)
    (grad,) = torch.autograd.grad(plain.square().sum(), x)
    torch.manual_seed(0)
    recomputed = torch.utils.checkpoint.checkpoint(
        lambda t: dropout(t, 0.4), x, use_reentrant=False
    )
    torch.testing.assert_close(torch.autograd.grad(recomputed.square().sum(), x)[0], grad)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_the_ends(p):
    x = torch.randn(5, 5)
    assert torch.equal(dropout(x, p), x if p == 0 else torch.zeros_like(x))


def test_compiles():
    x = torch.ones(16, 16)
    compiled = torch.compile(lambda t: dropout(t, 0.5), backend="eager", fullgraph=True)
    assert set(compiled(x).unique().tolist()) <= {0.0, 2.0}
