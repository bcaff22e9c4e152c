"""Derivatives other than the first gradient are right, or an error that names the function and the fix."""

from __future__ import annotations

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from random_adapters import randomise
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vmap

from lorakit import LoRA, attach
from lorakit.errors import LorakitError
from lorakit.models.faster import make_faster, make_stock
from lorakit.ops.attention import masked_attention
from lorakit.ops.dropout import dropout
from lorakit.ops.linear_cross_entropy import linear_cross_entropy
from lorakit.ops.lora_linear import Product, lora_linear
from lorakit.ops.rms_norm import rms_norm
from lorakit.ops.rows import put_rows, take_rows
from lorakit.ops.silu_product import silu_product

A, B = torch.randn(2, 8), torch.randn(8, 2)
AT = torch.tensor([2, 0])

ONCE = {
    "rms_norm": lambda x: rms_norm(x, torch.ones(8), 1e-6),
    "silu_product": lambda x: silu_product(x, x),
    "attention": lambda x: masked_attention(*[x.view(1, 1, 4, 8)] * 3, scale=1.0),
    "linear_cross_entropy": lambda x: linear_cross_entropy(x, A, torch.tensor([0, 1, 1, 0])),
}
"""Functions without a second derivative, by their module."""

TWICE = {
    "rows": lambda x: put_rows(take_rows(x, AT).square(), AT, 3),
}
"""Functions with one."""

EVERY = {
    "lora_linear": lambda x: lora_linear(x, x * x, [Product(None, A, B, 2.0)]),
    "dropout": lambda x: dropout(x, 0.5).square(),
}
"""Functions with every derivative."""

BY_TORCH = {
    "lora_linear": lambda x: x * x + 2 * x @ (B @ A).T,
    "dropout": lambda x: F.dropout(x, 0.5).square(),
}
"""The same functions in PyTorch's own operations."""

TRANSFORMS = {
    "grad": lambda f, x: grad(lambda x: f(x).sum())(x),
    "vmap": lambda f, x: vmap(f, randomness="different")(x[None]),
    "jvp": lambda f, x: jvp(f, (x,), (x,)),
    "jacrev": lambda f, x: jacrev(f)(x),
}


def rows() -> Tensor:
    return torch.linspace(-1, 1, 32).view(4, 8)


def in_forward_mode(f, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


@pytest.mark.parametrize("transform", [*TRANSFORMS.values(), in_forward_mode])
@pytest.mark.parametrize("module", [*ONCE, *TWICE])
def test_a_transform_is_an_error_that_names_the_function(module: str, transform) -> None:
    with pytest.raises(LorakitError, match=rf"^lorakit\.ops\.{module} does not support torch.func"):
        transform({**ONCE, **TWICE}[module], rows())


@pytest.mark.parametrize("transform", [*TRANSFORMS.values(), in_forward_mode])
@pytest.mark.parametrize("module", EVERY)
def test_the_functions_of_an_adapter_have_every_transform(module: str, transform) -> None:
    found, expected = [], []
    for f, results in ((EVERY[module], found), (BY_TORCH[module], expected)):
        torch.manual_seed(0)  # of the masks
        results.append(transform(f, rows()))
    torch.testing.assert_close(found, expected)


def test_other_tensors_of_forward_mode_do_not_matter() -> None:
    with forward_ad.dual_level():
        forward_ad.make_dual(torch.ones(2), torch.ones(2))
        assert ONCE["rms_norm"](rows()).shape == (4, 8)


@pytest.mark.parametrize("module", ONCE)
@pytest.mark.parametrize("by_gradient", [False, True])
def test_a_second_derivative_is_an_error_that_names_the_function(module, by_gradient) -> None:
    """Also where the incoming gradient is constant: the terms of the function were missing from the sum."""
    x = rows().requires_grad_()
    output = ONCE[module](x).sum()
    total = (output.square() if by_gradient else output) + x.pow(3).sum()
    (gradient,) = torch.autograd.grad(total, x, create_graph=True)
    with pytest.raises(LorakitError, match=rf"^lorakit\.ops\.{module} has no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("module", ONCE)
def test_a_first_derivative_with_a_graph_is_the_same(module: str) -> None:
    x = rows().requires_grad_()
    plain, with_graph = (
        torch.autograd.grad(ONCE[module](x).sum(), x, create_graph=create)[0]
        for create in (False, True)
    )
    assert torch.equal(plain, with_graph)


@pytest.mark.parametrize("tokens", [None, slice(1, 3), AT], ids=["all", "slice", "index"])
def test_second_derivatives_of_products(tokens: slice | Tensor | None) -> None:
    x = rows().double().requires_grad_()
    product = Product(tokens, A.double(), B.double(), 2.0)
    assert torch.autograd.gradgradcheck(lambda x: lora_linear(x, x * x, [product]), (x,))


def test_second_derivatives_of_rows() -> None:
    assert torch.autograd.gradgradcheck(TWICE["rows"], (rows().double().requires_grad_(),))


def test_an_adapted_model_has_every_transform() -> None:
    model = tiny_models.build("llama")
    adapters = attach(model, LoRA(rank=2, dropout=0.1))
    randomise(adapters)
    parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    ids = torch.arange(3, 17).view(2, 7)

    def loss(parameters, ids):
        return functional_call(model, parameters, (), {"input_ids": ids, "labels": ids}).loss

    model(input_ids=ids, labels=ids).loss.backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    torch.testing.assert_close(grad(loss)(parameters, ids), expected)
    by_row = vmap(grad(loss), (None, 0))(parameters, ids[:, None])
    torch.testing.assert_close({n: g.mean(0) for n, g in by_row.items()}, expected)
    make_faster(model)
    with pytest.raises(LorakitError, match=r"^lorakit\.ops\..*make_stock\(model\)"):
        grad(loss)(parameters, ids)
    make_stock(model)
    torch.testing.assert_close(grad(loss)(parameters, ids), expected)
