"""Compare the gate of SwiGLU with its plain PyTorch reference."""

import torch
from references import silu_product_reference
from torch.autograd import gradcheck

from lorakit.ops.silu_product import silu_product


def tensors(dtype, *shape):
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return [(3 * x).to(dtype).requires_grad_() for x in drawn]


def test_gradients_in_float64():
    assert gradcheck(silu_product, tensors(torch.float64, 3, 5))


def test_bfloat16_is_the_plain_twin_bit_for_bit():
    results = []
    for function in (silu_product, silu_product_reference):
        gate, up = tensors(torch.bfloat16, 4, 100)
        y = function(gate, up)
        y.float().square().sum().backward()
        results.append([y, gate.grad, up.grad])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=0)


def test_keeps_its_two_inputs():
    gate, up = tensors(torch.bfloat16, 4, 6)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        silu_product(gate, up)
    assert [t.data_ptr() for t in kept] == [gate.data_ptr(), up.data_ptr()]


def test_an_input_that_needs_no_gradient_gets_none():
    gate, up = tensors(torch.float32, 4, 6)
    up.requires_grad_(False)
    silu_product(gate, up).sum().backward()
    assert gate.grad is not None
    assert up.grad is None
