"""Compare the norm with its plain PyTorch reference, in float64 and bfloat16."""

import pytest
import torch
from references import rms_norm_reference
from torch.autograd import gradcheck
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lorakit.ops.rms_norm import rms_norm


def tensors(dtype, *shape, weight=None):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
    scale = 1 + torch.randn(shape[-1], generator=generator, dtype=torch.float64)
    return x.requires_grad_(), scale.to(weight or dtype).requires_grad_()


def test_gradients_in_float64():
    assert gradcheck(lambda x, w: rms_norm(x, w, 0.1), tensors(torch.float64, 2, 3, 5))


@pytest.mark.parametrize("weight", [torch.float32, torch.float64])
def test_value_and_gradients_equal_the_plain_twin(weight):
    results = []
    for function in (rms_norm, rms_norm_reference):
        x, w = tensors(torch.float32, 4, 7, 33, weight=weight)
        y = function(x, w, 1e-6)
        y.sin().sum().backward()
        results.append([y, x.grad, w.grad])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=2e-6, atol=2e-6)


def test_bfloat16_rounds_where_llama_does():
    x, w = tensors(torch.bfloat16, 6, 96)
    stock = LlamaRMSNorm(96, eps=1e-5).to(torch.bfloat16)
    stock.weight.data.copy_(w.data)
    ours = rms_norm(x, w, 1e-5)
    assert ours.dtype == torch.bfloat16
    # The summation order differs, which flips the last bit of quotients that are near ties.
    assert (ours != stock(x)).float().mean() < 0.01
    torch.testing.assert_close(ours, stock(x), rtol=2**-7, atol=0)


def test_bfloat16_gradient_is_within_two_roundings_of_float32():
    x, w = tensors(torch.bfloat16, 8, 96)
    exact_x, exact_w = (t.detach().float().requires_grad_() for t in (x, w))
    rms_norm(x, w, 1e-5).float().square().sum().backward()
    rms_norm_reference(exact_x, exact_w, 1e-5).square().sum().backward()
    for ours, exact in ((x.grad, exact_x.grad), (w.grad, exact_w.grad)):
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - exact).norm() <= 2**-7 * exact.norm()


def test_keeps_its_input_and_a_number_a_row():
    x, w = tensors(torch.bfloat16, 10, 64)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rms_norm(x, w, 1e-5)
    assert sorted((t.numel(), t.data_ptr() == x.data_ptr()) for t in kept) == [
        (10, False),
        (64, False),
        (640, True),
    ]


def test_frozen_weight_gets_no_gradient():
    x, w = tensors(torch.float32, 3, 8)
    w.requires_grad_(False)
    rms_norm(x, w, 1e-5).sum().backward()
    assert w.grad is None
    assert x.grad is not None


def test_under_autocast_it_is_what_it_is_without():
    x, w = tensors(torch.float32, 3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        ours = rms_norm(x, w, 1e-5)
    torch.testing.assert_close(ours, rms_norm(x, w, 1e-5), rtol=0, atol=0)
