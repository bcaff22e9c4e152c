"""Compare the fused product with its plain PyTorch reference, in float64 and bfloat16."""

import pytest
import torch
from references import lora_linear_reference
from torch.autograd import gradcheck

from lorakit.ops.lora_linear import lora_linear


def tensors(dtype, shape=(3, 5), n_in=7, n_out=11, rank=2, master=None):
    generator = torch.Generator().manual_seed(0)

    def draw(*size, dtype=dtype):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    master = master or dtype
    return (
        draw(*shape, n_in).requires_grad_(),
        draw(*shape, n_out).requires_grad_(),
        draw(rank, n_in, dtype=master).requires_grad_(),
        draw(n_out, rank, dtype=master).requires_grad_(),
    )


@pytest.mark.parametrize("in_place", [True, False])
def test_gradients_in_float64(in_place):
    x, out, A, B = tensors(torch.float64)

    def product(x, out, A, B):
        return lora_linear(x, out.clone(), A, B, 1.7, in_place=in_place)

    assert gradcheck(product, (x, out, A, B))


def test_value_and_gradients_equal_the_plain_twin():
    results = []
    for function in (lora_linear, lora_linear_reference):
        x, out, A, B = tensors(torch.float32)
        y = function(x, out.clone(), A, B, 0.3)
        (y.sin().sum()).backward()
        results.append([y, x.grad, out.grad, A.grad, B.grad])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def test_bfloat16_stays_within_its_rounding_of_float32():
    """Allow two roundings of 2**-8 relative to the largest term."""
    x, out, A, B = tensors(torch.bfloat16, master=torch.float32)
    y = lora_linear(x, out.clone(), A, B, 0.5)
    exact = lora_linear_reference(x.float(), out.float(), A, B, 0.5)
    assert y.dtype == torch.bfloat16
    assert A.dtype == torch.float32
    assert (y.float() - exact).abs().max() <= 2**-7 * exact.abs().max()
    y.float().sum().backward()
    assert A.grad.dtype == torch.float32


def test_writes_in_place_and_saves_no_full_size_tensor():
    x, out, A, B = tensors(torch.float32)
    target = out.detach().clone()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.shape) or t, lambda t: t
    ):
        y = lora_linear(x, target, A, B, 1.0)
    assert y.data_ptr() == target.data_ptr()
    assert sorted(map(tuple, saved)) == sorted([(3, 5, 7), (15, 2), (2, 7), (11, 2)])


def test_a_view_is_left_alone():
    x, _, A, B = tensors(torch.float32)
    base = torch.zeros(15, 11)
    view = base.view(3, 5, 11)
    y = lora_linear(x, view, A, B, 1.0)
    assert base.abs().max() == 0
    torch.testing.assert_close(y, lora_linear_reference(x, view, A, B, 1.0))


def test_no_input_gradient_where_none_is_needed():
    x, out, A, B = tensors(torch.float32)
    x = x.detach()
    lora_linear(x, out.clone(), A, B, 1.0).sum().backward()
    assert x.grad is None
    assert A.grad is not None


def test_under_autocast_it_computes_in_the_output_dtype():
    x, _, A, B = tensors(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lora_linear(x, torch.zeros(3, 5, 11, dtype=torch.bfloat16), A, B, 1.0)
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_place", [True, False])
def test_without_gradients(in_place, master):
    x, out, A, B = (t.detach() for t in tensors(torch.bfloat16, master=master))
    target = out.clone()
    with torch.no_grad():
        y = lora_linear(x, target, A, B, 0.5, in_place=in_place)
    assert (y.data_ptr() == target.data_ptr()) == in_place
    assert torch.equal(target, out) != in_place
    assert y.dtype == torch.bfloat16
    exact = lora_linear_reference(x.float(), out.float(), A.float(), B.float(), 0.5)
    assert (y.float() - exact).abs().max() <= 2**-7 * exact.abs().max()


def test_without_gradients_a_narrow_adapter_is_multiplied_in_the_dtype_of_the_output():
    x, out, A, B = (t.detach() for t in tensors(torch.float32, shape=(2,), master=torch.bfloat16))
    with torch.no_grad():
        y = lora_linear(x, out.clone(), A, B, 0.5)
    torch.testing.assert_close(y, lora_linear_reference(x, out, A, B, 0.5))


def test_on_a_float16_base_the_product_is_scaled_before_it_is_rounded():
    """The unscaled product overflows float16, the scaled product does not."""
    x, A, B = torch.full((1, 8), 30.0).half(), torch.full((2, 8), 2.0), torch.full((3, 2), 100.0)
    with torch.no_grad():
        found = lora_linear(x, torch.zeros(1, 3).half(), A, B, 0.01)
    assert torch.equal(found, torch.full((1, 3), 960.0).half())
