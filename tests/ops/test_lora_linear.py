"""Compare the products with plain PyTorch, in float64 and bfloat16."""

import pytest
import torch
from references import lora_linear_reference
from torch.autograd import gradcheck

from lorakit.ops.lora_linear import Product, add_products, lora_linear


def whole(x, out, A, B, scaling, in_place=True):
    """Return the output with one product for all tokens."""
    return lora_linear(x, out, [Product(None, A, B, scaling)], in_place=in_place)


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
        return whole(x, out.clone(), A, B, 1.7, in_place=in_place)

    assert gradcheck(product, (x, out, A, B))


def test_value_and_gradients_equal_the_plain_twin():
    results = []
    for function in (whole, lora_linear_reference):
        x, out, A, B = tensors(torch.float32)
        y = function(x, out.clone(), A, B, 0.3)
        (y.sin().sum()).backward()
        results.append([y, x.grad, out.grad, A.grad, B.grad])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def test_bfloat16_stays_within_its_rounding_of_float32():
    """Allow two roundings of 2**-8 relative to the largest term."""
    x, out, A, B = tensors(torch.bfloat16, master=torch.float32)
    y = whole(x, out.clone(), A, B, 0.5)
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
        y = whole(x, target, A, B, 1.0)
    assert y.data_ptr() == target.data_ptr()
    assert sorted(map(tuple, saved)) == sorted([(3, 5, 7), (15, 2), (2, 7), (11, 2)])


def test_a_view_is_left_alone():
    x, _, A, B = tensors(torch.float32)
    base = torch.zeros(15, 11)
    view = base.view(3, 5, 11)
    y = whole(x, view, A, B, 1.0)
    assert base.abs().max() == 0
    torch.testing.assert_close(y, lora_linear_reference(x, view, A, B, 1.0))


def test_no_input_gradient_where_none_is_needed():
    x, out, A, B = tensors(torch.float32)
    x = x.detach()
    whole(x, out.clone(), A, B, 1.0).sum().backward()
    assert x.grad is None
    assert A.grad is not None


def test_under_autocast_it_computes_in_the_output_dtype():
    x, _, A, B = tensors(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = whole(x, torch.zeros(3, 5, 11, dtype=torch.bfloat16), A, B, 1.0)
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_place", [True, False])
def test_without_gradients(in_place, master):
    x, out, A, B = (t.detach() for t in tensors(torch.bfloat16, master=master))
    target = out.clone()
    with torch.no_grad():
        y = whole(x, target, A, B, 0.5, in_place=in_place)
    assert (y.data_ptr() == target.data_ptr()) == in_place
    assert torch.equal(target, out) != in_place
    assert y.dtype == torch.bfloat16
    exact = lora_linear_reference(x.float(), out.float(), A.float(), B.float(), 0.5)
    assert (y.float() - exact).abs().max() <= 2**-7 * exact.abs().max()


def test_without_gradients_a_narrow_adapter_is_multiplied_in_the_dtype_of_the_output():
    x, out, A, B = (t.detach() for t in tensors(torch.float32, shape=(2,), master=torch.bfloat16))
    with torch.no_grad():
        y = whole(x, out.clone(), A, B, 0.5)
    torch.testing.assert_close(y, lora_linear_reference(x, out, A, B, 0.5))


def test_on_a_float16_base_the_product_is_scaled_before_it_is_rounded():
    """The unscaled product overflows float16, the scaled product does not."""
    x, A, B = torch.full((1, 8), 30.0).half(), torch.full((2, 8), 2.0), torch.full((3, 2), 100.0)
    with torch.no_grad():
        found = whole(x, torch.zeros(1, 3).half(), A, B, 0.01)
    assert torch.equal(found, torch.full((1, 3), 960.0).half())


# --- products of several adapters ----------------------------------------------------------------------

N, IN, OUT = 7, 6, 5
TIGHT = {"rtol": 1e-12, "atol": 1e-13}


def mixed():
    """Return x, out and products for some of the tokens; two of them overlap, as in a blend."""

    def random(*shape):
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    products = [
        Product(slice(1, 3), random(2, IN), random(OUT, 2), 0.5),
        Product(torch.tensor([0, 4, 6]), random(3, IN), random(OUT, 3), -2.0),
        Product(torch.tensor([4, 6]), random(1, IN), random(OUT, 1), 1.5),
    ]
    return random(N, IN), random(N, OUT), products


def by_hand(x, out, products):
    rows = list(out)
    for tokens, A, B, scaling in products:
        for i in torch.arange(N)[tokens].tolist():
            rows[i] = rows[i] + scaling * (x[i] @ A.T @ B.T)
    return torch.stack(rows)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("function", [lora_linear, add_products])
def test_each_product_for_its_tokens(function, gradients):
    x, out, products = mixed()
    before = out.clone()
    with torch.set_grad_enabled(gradients):
        actual = function(x, out, products)
    torch.testing.assert_close(actual, by_hand(x, out, products), **TIGHT)
    assert torch.equal(out, before)
    assert torch.equal(actual[[3, 5]], out[[3, 5]])


@pytest.mark.parametrize("in_place", [True, False])
def test_gradients_of_mixed_products(in_place):
    x, out, products = mixed()
    tensors = [x, out, *(t for product in products for t in (product.A, product.B))]
    actual = lora_linear(x, out * 1, products, in_place=in_place).tanh().sum()
    expected = by_hand(x, out, products).tanh().sum()
    torch.testing.assert_close(
        torch.autograd.grad(actual, tensors), torch.autograd.grad(expected, tensors), **TIGHT
    )


def test_only_what_needs_a_gradient_gets_one():
    x, out, products = mixed()
    frozen = [product._replace(A=product.A.detach()) for product in products]
    lora_linear(x.detach(), out.detach(), frozen).sum().backward()
    assert x.grad is None
    assert products[0].A.grad is None
    assert products[0].B.grad is not None


def test_a_gradient_penalty():
    """PyTorch would give no gradient, without an error, to a function without a second derivative."""
    x, out, products = mixed()
    tensors = [x, *(t for product in products for t in (product.A, product.B))]

    def penalties(total):
        (gradient,) = torch.autograd.grad(total[:, 1].sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), tensors, materialize_grads=True)

    actual = penalties(lora_linear(x, out, products))
    torch.testing.assert_close(actual, penalties(by_hand(x, out, products)), **TIGHT)
    assert all(gradient.abs().max() > 0 for gradient in actual[1:3])
