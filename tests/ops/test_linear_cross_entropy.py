"""Compare the chunked loss with its plain PyTorch reference."""

import pytest
import torch
from references import linear_cross_entropy_reference
from torch.autograd import gradcheck
from torch.utils.flop_counter import FlopCounterMode

from lorakit.ops.linear_cross_entropy import linear_cross_entropy
from lorakit.ops.rows import rounded_rows


def tensors(dtype, n=13, d=6, vocabulary=17):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, d, generator=generator, dtype=torch.float64).to(dtype)
    bias = torch.randn(vocabulary, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(vocabulary, (n,), generator=generator)
    return hidden, weight, targets, bias


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("chunk", [1, 4, 13, 100])
def test_equals_the_plain_twin_in_float64(smoothing, with_bias, weighted, chunk, monkeypatch):
    """Larger chunks have several blocks of two rows."""
    two_rows = 2 * 17 * torch.float64.itemsize
    monkeypatch.setattr("lorakit.ops.linear_cross_entropy.CACHE_BYTES", two_rows)
    hidden, weight, targets, bias = tensors(torch.float64)
    trained = [hidden, weight.requires_grad_(), *([bias.requires_grad_()] if with_bias else [])]
    settings = {
        "bias": bias if with_bias else None,
        "weights": torch.arange(13.0, dtype=torch.float64) % 3 if weighted else None,
        "label_smoothing": smoothing,
    }
    ours = linear_cross_entropy(hidden, weight, targets, chunk=chunk, **settings)
    plain = linear_cross_entropy_reference(hidden, weight, targets, **settings)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    ours_grads = torch.autograd.grad(ours * 3, trained)
    plain_grads = torch.autograd.grad(plain * 3, trained)
    for found, expected in zip(ours_grads, plain_grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    hidden, weight, targets, bias = tensors(torch.float64)
    weights = torch.linspace(0.5, 2, len(targets), dtype=torch.float64)
    assert gradcheck(
        lambda h, w, b: linear_cross_entropy(
            h, w, targets, b, weights=weights, label_smoothing=0.2, chunk=5
        ),
        (hidden, weight.requires_grad_(), bias.requires_grad_()),
    )


@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (1, 2)], ids=str)
def test_each_gradient_comes_alone(trained):
    hidden, weight, targets, bias = tensors(torch.float64)
    inputs = [hidden.detach(), weight, bias]
    wanted = [inputs[i].requires_grad_() for i in trained]
    ours = linear_cross_entropy(inputs[0], inputs[1], targets, inputs[2], chunk=4)
    plain = linear_cross_entropy_reference(inputs[0], inputs[1], targets, inputs[2])
    expected = torch.autograd.grad(plain, wanted)
    ours.backward()
    for i, tensor in enumerate(inputs):
        assert (tensor.grad is not None) == (i in trained)
    for tensor, gradient in zip(wanted, expected, strict=True):
        torch.testing.assert_close(tensor.grad, gradient, rtol=1e-12, atol=1e-12)


def relative_error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("master", [torch.bfloat16, torch.float32], ids=str)
def test_bfloat16_gradients_are_summed_in_float32(master):
    """Use hundreds of chunks of one row; a sum in bfloat16 would lose the last ones."""
    n = 2048
    hidden, weight, targets, bias = tensors(torch.bfloat16, n=n)
    weight, bias = (x.to(master).requires_grad_() for x in (weight, bias))
    loss = linear_cross_entropy(hidden, weight, targets, bias, chunk=1)
    loss.backward()
    assert (weight.grad.dtype, bias.grad.dtype) == (master, master)

    exact = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    reference = linear_cross_entropy_reference(exact[0], exact[1], targets, exact[2])
    reference.backward()
    for ours, true in zip((hidden, weight, bias), exact, strict=True):
        assert relative_error(ours.grad, true.grad) < 2**-7
    # Summing in bfloat16 gives many times the error.
    parts = torch.zeros_like(weight, dtype=torch.bfloat16)
    for h, y in zip(exact[0].detach(), targets, strict=True):
        p = (exact[1] @ h + exact[2]).softmax(0).detach()
        p[y] -= 1
        parts += torch.outer(p, h).bfloat16()
    assert relative_error(parts, exact[1].grad) > 4 * relative_error(weight.grad, exact[1].grad)


def test_bfloat16_loss_is_summed_in_float32():
    hidden, weight, targets, bias = tensors(torch.bfloat16, n=64)
    ours = linear_cross_entropy(hidden, weight, targets, bias, chunk=7)
    exact = linear_cross_entropy_reference(hidden.float(), weight.float(), targets, bias.float())
    assert ours.dtype == torch.float32
    # The logits are rounded to bfloat16 once (2**-9 relative); everything after is float32.
    assert abs(ours - exact) <= 2**-8 * exact


def test_a_factor_on_the_loss_is_not_rounded_to_bfloat16():
    """1 / 171 in bfloat16 is off by 2e-3; the products' own rounding cancels in the norm."""
    hidden, weight, targets, _ = tensors(torch.bfloat16, n=512, d=32)
    (alone,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), hidden)
    (scaled,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets) / 171, hidden)
    assert scaled.dtype == torch.bfloat16
    ratio = 171 * scaled.double().norm() / alone.double().norm()
    assert abs(ratio - 1) < 5e-4


def test_no_gradient_is_formed_without_need():
    """A loss of validation computes the product for the logits only, also with a head that is trained."""
    hidden, weight, targets, bias = tensors(torch.float32)
    arguments = hidden, weight.requires_grad_(), targets, bias.requires_grad_()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        loss = linear_cross_entropy(*arguments)
    assert not loss.requires_grad
    assert torch.equal(loss, linear_cross_entropy(*arguments))
    rows = rounded_rows(len(hidden))
    assert counter.get_total_flops() == 2 * rows * weight.numel()


def test_products_have_few_numbers_of_rows(monkeypatch):
    """Padding rows round up the row count and do not affect loss and gradients."""
    seen: set[int] = set()
    linear = torch.nn.functional.linear

    def noted(x, *others):
        seen.add(len(x))
        return linear(x, *others)

    for n in range(257, 289):
        hidden, weight, targets, bias = tensors(torch.float64, n=n)
        trained = [hidden, weight.requires_grad_(), bias.requires_grad_()]
        with monkeypatch.context() as patched:
            patched.setattr(torch.nn.functional, "linear", noted)
            ours = linear_cross_entropy(hidden, weight, targets, bias)
        plain = linear_cross_entropy_reference(hidden, weight, targets, bias)
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
        for found, expected in zip(
            torch.autograd.grad(ours, trained), torch.autograd.grad(plain, trained), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert seen == {288}
