"""Addition of low-rank products to a frozen layer's output, each to its own tokens of a batch.

The tokens of a product are gathered, multiplied by its thin matrices and scattered back. No product is ever masked, so
NaN of one adapter stays in its tokens.

Suffixes name dimensions: N tokens of the batch, M tokens of one product, D inputs, R rank, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lorakit.errors import AdapterStateError

Rows = slice | Tensor | None
"""Entries of the first axis of a tensor: one contiguous slice, an int64 index of unique entries, or None for all."""


class Product(NamedTuple):
    """``scaling * x A^T B^T`` for some tokens."""

    tokens: Rows
    A: Tensor
    """Shape (rank, in)."""
    B: Tensor
    """Shape (out, rank)."""
    scaling: float


def take(x: Tensor, rows: Rows) -> Tensor:
    """Return these entries of the first axis of `x`: `x` itself for all, a view of a slice, a copy for an index."""
    if rows is None:
        return x
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)


def put(x: Tensor, rows: Rows, values: Tensor) -> Tensor:
    """Return `x` with `values` at these entries of its first axis, out of place."""
    if rows is None:
        return values
    if isinstance(rows, slice):
        return torch.slice_scatter(x, values, 0, rows.start, rows.stop)
    return x.index_copy(0, rows, values)


def lora_linear(
    x: Tensor, out: Tensor, products: Sequence[Product], *, in_place: bool = False
) -> Tensor:
    """Return ``out + scaling * x A^T B^T`` for the tokens of each product (Hu et al. 2021, equation 3).

    The products are computed in the dtype of `out`: A and B (thin, often float32 masters) are cast, and under autocast
    `x` is. The backward pass needs only `x` and the rank-sized intermediates.

    Args:
        x: Input of the layer, shape (..., in). Its leading axes are the N tokens, in row-major order.
        out: Output of the frozen layer, shape (..., out).
        products: Their tokens may overlap: the products are then added. Other tokens keep `out`.
        in_place: Write into `out`, which no other code may use afterwards. False returns a new tensor. So does True
            if `out` is a view or not contiguous, and while compiling.

    Returns:
        Shape (..., out), the dtype of `out`. The caller may modify it in place: it is a view only under
        torch.jit.trace, torch.func and forward-mode derivatives.
    """
    for product in products:
        require_data(product.A, x)
    if x.dtype != out.dtype:  # autocast: the layer's output dtype differs from its input dtype
        x = x.to(out.dtype)
    if _needs_plain_operations():
        return add_products(x, out, products)
    kind = out.device.type
    if torch.is_autocast_enabled(kind):  # it would change the dtypes chosen here
        with torch.autocast(kind, enabled=False):
            return lora_linear(x, out, products, in_place=in_place)
    # A custom function cannot modify a view and return it. A compiler cannot check for views, and fuses the
    # addition anyway.
    in_place = (
        in_place
        and not torch.compiler.is_compiling()
        and out.is_contiguous()
        and not out._is_view()
    )
    if torch.is_grad_enabled():
        places = [(product.tokens, product.scaling) for product in products]
        factors = [factor for product in products for factor in (product.A, product.B)]
        return _LoraLinear.apply(x, out, in_place, places, *factors)
    total = out if in_place else out.clone(memory_format=torch.contiguous_format)
    for product in products:
        _add(total, _hidden(x, product.tokens, product.A), product)
    return total


def _needs_plain_operations() -> bool:
    """Whether torch.jit.trace, torch.func or forward-mode derivatives are active, which the custom function lacks."""
    if torch.compiler.is_compiling():
        return False
    is_transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return is_transformed or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]


def add_products(x: Tensor, out: Tensor, products: Sequence[Product]) -> Tensor:
    """Compute `lora_linear` with plain operations, which have every derivative: its test oracle."""
    flat, total = x.reshape(-1, x.shape[-1]), out.reshape(-1, out.shape[-1])
    for tokens, A, B, scaling in products:
        change = take(flat, tokens) @ A.to(out.dtype).T @ B.to(out.dtype).T
        total = put(total, tokens, take(total, tokens) + change * scaling)
    return total.view(out.shape)


def require_data(A: Tensor, x: Tensor) -> None:
    """Reject an adapter on the meta device: PyTorch returns uninitialised memory for its product with an input.

    Raises:
        AdapterStateError: A has no data, and x has.
    """
    if A.is_meta and not x.is_meta:
        raise AdapterStateError(
            "The adapter's tensors are on the meta device: accelerate has offloaded them (cpu_offload, disk_offload), "
            "or the model was built there and its state dict had no tensors for them. Load the base without "
            "offloading, quantised if it is too large, and then attach or load the adapter."
        )


def _hidden(x: Tensor, tokens: Rows, A: Tensor) -> Tensor:
    """Return the product of some tokens of `x` (..., D) with A, (M, R)."""
    return take(x.reshape(-1, x.shape[-1]), tokens) @ A.to(x.dtype).T


def _add(total: Tensor, h_MR: Tensor, product: Product) -> None:
    """Add ``scaling * h B^T`` to the tokens of `total` (..., O), in place."""
    tokens, _, B, scaling = product
    flat_NO, B = total.view(-1, total.shape[-1]), B.to(total.dtype)
    if isinstance(tokens, Tensor):
        sums = torch.addmm(flat_NO.index_select(0, tokens), h_MR, B.T, alpha=scaling)
        flat_NO.index_copy_(0, tokens, sums)
    else:
        take(flat_NO, tokens).addmm_(h_MR, B.T, alpha=scaling)


_INDEX = "index"
"""Marks the tokens of a product that are among the saved tensors."""


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, out, in_place, places, *factors):
        # Autograd rejects in-place operations on a view that a custom function returns, and models apply them to
        # outputs of layers (Falcon's residual sum, `nn.ReLU(inplace=True)`). So the sum is no view of another shape.
        total = out if in_place else out.clone(memory_format=torch.contiguous_format)
        if in_place:
            ctx.mark_dirty(out)
        hidden = []
        for (tokens, scaling), A, B in zip(places, factors[::2], factors[1::2], strict=True):
            hidden.append(_hidden(x, tokens, A))
            _add(total, hidden[-1], Product(tokens, A, B, scaling))
        indices = [tokens for tokens, _ in places if isinstance(tokens, Tensor)]
        ctx.save_for_backward(x, *factors, *hidden, *indices)
        ctx.places = [(_INDEX if isinstance(t, Tensor) else t, scaling) for t, scaling in places]
        return total

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        count = len(ctx.places)
        x, *saved = ctx.saved_tensors
        factors, hidden = saved[: 2 * count], saved[2 * count : 3 * count]
        indices = iter(saved[3 * count :])
        x_ND, grad_NO = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_x, grads = None, []
        for i, (place, scaling) in enumerate(ctx.places):
            tokens = next(indices) if place == _INDEX else place
            A, B, h_MR = factors[2 * i], factors[2 * i + 1], hidden[i]
            needs_A, needs_B = ctx.needs_input_grad[4 + 2 * i : 6 + 2 * i]
            if torch.is_grad_enabled():  # for a second derivative, which h has too
                h_MR = _hidden(x, tokens, A)
            grad_MO = take(grad_NO, tokens)
            grad_A = grad_B = None
            if needs_B:
                grad_B = (grad_MO.T @ h_MR).mul_(scaling).to(B.dtype)
            if needs_A or ctx.needs_input_grad[0]:
                grad_h_MR = (grad_MO @ B.to(grad.dtype)).mul_(scaling)
                if needs_A:
                    grad_A = (grad_h_MR.T @ take(x_ND, tokens)).to(A.dtype)
                if ctx.needs_input_grad[0]:
                    grad_x = _added(grad_x, x_ND, tokens, grad_h_MR, A.to(grad.dtype))
            grads += [grad_A, grad_B]
        if ctx.needs_input_grad[0]:
            grad_x = torch.zeros_like(x) if grad_x is None else grad_x.view(x.shape)
        return grad_x, grad, None, None, *grads


def _added(
    total: Tensor | None, like: Tensor, tokens: Rows, grad_h_MR: Tensor, A: Tensor
) -> Tensor:
    """Return the gradient of the input (N, D) with that of one product added."""
    if total is None and tokens is None:
        return grad_h_MR @ A
    total = torch.zeros_like(like) if total is None else total
    return put(total, tokens, torch.addmm(take(total, tokens), grad_h_MR, A))
