"""The chunked loss against its plain twin."""

import pytest
import torch
from torch.autograd import gradcheck

from lorakit.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference


def tensors(dtype, n=13, d=6, vocabulary=17):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, d, generator=generator, dtype=torch.float64).to(dtype)
    bias = torch.randn(vocabulary, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(vocabulary, (n,), generator=generator)
    return hidden, weight, targets, bias


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("chunk", [1, 4, 13, 100])
def test_equals_the_plain_twin_in_float64(smoothing, with_bias, chunk):
    hidden, weight, targets, bias = tensors(torch.float64)
    bias = bias if with_bias else None
    ours = linear_cross_entropy(
        hidden, weight, targets, bias, label_smoothing=smoothing, chunk=chunk
    )
    (ours_grad,) = torch.autograd.grad(ours * 3, hidden)
    plain = linear_cross_entropy_reference(hidden, weight, targets, bias, label_smoothing=smoothing)
    (plain_grad,) = torch.autograd.grad(plain * 3, hidden)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours_grad, plain_grad, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    hidden, weight, targets, bias = tensors(torch.float64)
    assert gradcheck(
        lambda h: linear_cross_entropy(h, weight, targets, bias, label_smoothing=0.2, chunk=5),
        (hidden,),
    )


def test_bfloat16_loss_is_summed_in_float32():
    hidden, weight, targets, bias = tensors(torch.bfloat16, n=64)
    ours = linear_cross_entropy(hidden, weight, targets, bias, chunk=7)
    exact = linear_cross_entropy_reference(hidden.float(), weight.float(), targets, bias.float())
    assert ours.dtype == torch.float32
    # The logits are rounded to bfloat16 once (2**-9 relative); everything after is float32.
    assert abs(ours - exact) <= 2**-8 * exact


def test_no_gradient_is_formed_without_need():
    hidden, weight, targets, _ = tensors(torch.float32)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, targets)
    assert not loss.requires_grad
