"""Addition of the low-rank product to a frozen layer's output.

Suffixes name dimensions: N tokens of the batch, D inputs, R rank, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.errors import AdapterStateError
from lorakit.ops.autocast import no_autocast
from lorakit.ops.derivatives import Function, apply, is_transformed


def lora_linear(
    x: Tensor, out: Tensor, A: Tensor, B: Tensor, scaling: float, *, in_place: bool = True
) -> Tensor:
    """Return ``out + scaling * x A^T B^T`` (Hu et al. 2021, equation 3).

    The product is computed in the dtype of `out`: A and B (thin, often float32 masters) are cast, the
    activations are not. The backward pass needs only `x` and the rank-sized intermediate.

    Args:
        x: Input of the layer, shape (..., in).
        out: Output of the frozen layer, shape (..., out).
        A: Shape (rank, in).
        B: Shape (out, rank).
        scaling: Factor on the product.
        in_place: Write into `out`, which no other code may use afterwards. False returns a new tensor. So does True
            if `out` is a view or not contiguous.

    Returns:
        Shape (..., out), the dtype of `out`. Never a view, so the caller may modify it in place.
    """
    require_data(A, x)
    if x.dtype != out.dtype:  # autocast: the layer's output dtype differs from its input dtype
        x = x.to(out.dtype)
    is_traced = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    # Plain operations have every derivative, and torch.jit.trace cannot record a custom function that writes in place.
    if is_traced or is_transformed(x, out, A, B):
        return out + (x @ A.to(out.dtype).T @ B.to(out.dtype).T) * scaling
    # A custom function cannot modify a view and return it. A compiler cannot check for views, and fuses the
    # addition anyway.
    in_place = (
        in_place
        and not torch.compiler.is_compiling()
        and out.is_contiguous()
        and not out._is_view()
    )
    with no_autocast(out):
        if torch.is_grad_enabled():
            return apply(_LoraLinear, x, out, A, B, scaling, in_place)
        h_NR = x.reshape(-1, x.shape[-1]) @ A.to(out.dtype).T
        return _add_matmul(out, h_NR, B.to(out.dtype), scaling, in_place)


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


def _add_matmul(out: Tensor, h_NR: Tensor, B: Tensor, scaling: float, in_place: bool) -> Tensor:
    """Return ``out + scaling * h B^T``: `out` itself if `in_place` is set, else a new tensor.

    Autograd rejects in-place operations on a view that a custom function returns, and models apply them to outputs
    of layers (Falcon's residual sum, `nn.ReLU(inplace=True)`). So the product is added to a copy of `out`;
    `torch.addmm` makes the same copy, but its result would have to be viewed in the shape of `out`.
    """
    total = out if in_place else out.clone(memory_format=torch.contiguous_format)
    total.view(-1, total.shape[-1]).addmm_(h_NR, B.T, alpha=scaling)
    return total


class _LoraLinear(Function):
    @staticmethod
    def forward(ctx, x, out, A, B, scaling, in_place):
        x_ND = x.reshape(-1, x.shape[-1])
        h_NR = x_ND @ A.to(out.dtype).T
        ctx.save_for_backward(x, h_NR, A, B)
        ctx.scaling = scaling
        total = _add_matmul(out, h_NR, B.to(out.dtype), scaling, in_place)
        if in_place:
            ctx.mark_dirty(out)
        return total

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, h_NR, A, B = ctx.saved_tensors
        x_ND = x.reshape(-1, x.shape[-1])
        if torch.is_grad_enabled():  # for a second derivative, which h has too
            h_NR = x_ND @ A.to(x.dtype).T
        needs_x, _, needs_A, needs_B, *_ = ctx.needs_input_grad
        grad_NO = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_A = grad_B = None
        if needs_B:
            grad_B = (grad_NO.T @ h_NR).mul_(ctx.scaling).to(B.dtype)
        if needs_x or needs_A:
            grad_h_NR = (grad_NO @ B.to(grad.dtype)).mul_(ctx.scaling)
            if needs_A:
                grad_A = (grad_h_NR.T @ x_ND).to(A.dtype)
            if needs_x:
                grad_x = (grad_h_NR @ A.to(grad.dtype)).view(x.shape)
        return grad_x, grad, grad_A, grad_B, None, None
