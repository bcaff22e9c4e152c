"""``W + scale * L R`` as a tensor that is never computed where it is only multiplied by.

The experts of a mixture read their stacked weights themselves, so an adapter cannot add to the output of a layer. The
sum would need the memory of all experts once more in each block, and the gradients as much again. This tensor takes the
place of W, and a product with it is ``W x + scale * L (R x)``. All other operations get the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.ops.autocast import no_autocast

_GROUPED_MM: Any = getattr(torch, "_grouped_mm", None)
"""What `F.grouped_mm` calls, so what `__torch_function__` sees."""
_ALIGNED = 16
"""Bytes of which each row of a factor must be a multiple in a grouped product."""


class LowRankSum(Tensor):
    """``W + scale * L R`` with W (..., m, n), L (..., m, r) and R (..., r, n); L and R may be wider than W."""

    W: Tensor
    L: Tensor
    R: Tensor
    scale: float
    total: Tensor | None
    """The sum, if an operation needed it. Kept, because a caller may read its memory (`data_ptr`)."""

    @staticmethod
    def __new__(cls, W: Tensor, L: Tensor, R: Tensor, scale: float) -> LowRankSum:
        total = Tensor._make_wrapper_subclass(cls, W.shape, dtype=W.dtype, device=W.device)  # type: ignore[attr-defined]
        total.W, total.L, total.R, total.scale = W, L, R, scale
        total.total = None
        return total

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            return super().__torch_function__(func, types, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            if func in _PRODUCTS and (bound := _bound(func, args, kwargs)) is not None:
                result = _PRODUCTS[func](*bound)
                if result is not NotImplemented:
                    return result
            return func(*map(_dense, args), **{name: _dense(v) for name, v in kwargs.items()})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Below autograd, where the sum would have no gradient; every call of PyTorch comes from above.
        raise RuntimeError(
            f"{func} was called below autograd on the weight of experts with an adapter"
        )

    def __deepcopy__(self, memo: Any) -> LowRankSum:
        return self  # of an interrupted call; the next one drops it

    def dense(self) -> Tensor:
        """Return the sum, computed once, in the dtype of L and R if that is wider."""
        needs_gradient = torch.is_grad_enabled() and any(
            t.requires_grad for t in (self.W, self.L, self.R)
        )
        if self.total is None or (needs_gradient and not self.total.requires_grad):
            dtype = torch.promote_types(self.W.dtype, self.L.dtype)
            with no_autocast(self.W):
                change = self.scale * (self.L.to(dtype) @ self.R.to(dtype))
                self.total = (self.W.to(dtype) + change).to(self.W.dtype)
        return self.total


def concatenated(factors: Sequence[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor, float]:
    """Return one L, R and scale with the same product as the sum of several."""
    if len(factors) == 1:
        return factors[0]
    L = torch.cat([scale * L for L, _, scale in factors], dim=-1)
    return L, torch.cat([R for _, R, _ in factors], dim=-2), 1.0


def _dense(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(_dense, value))
    return value.dense() if isinstance(value, LowRankSum) else value


def _matrix_transpose(total: LowRankSum) -> LowRankSum:
    return LowRankSum(total.W.mT, total.R.mT, total.L.mT, total.scale)


def _transpose(input: LowRankSum, dim0: int, dim1: int) -> Any:
    of_matrix = {input.ndim - 2, input.ndim - 1}
    is_whole = {dim0 % input.ndim, dim1 % input.ndim} == of_matrix
    return _matrix_transpose(input) if is_whole else NotImplemented


def _at(total: LowRankSum, index: Any) -> Any:
    """Index the experts; an index of rows or columns needs the sum."""
    is_number = isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32)
    if total.ndim < 3 or not (is_number or type(index) is int):
        return NotImplemented
    return LowRankSum(total.W[index], total.L[index], total.R[index], total.scale)


def _linear(input: Any, weight: Any, bias: Tensor | None = None) -> Any:
    if isinstance(input, LowRankSum) or not isinstance(weight, LowRankSum):
        return NotImplemented
    hidden = weight.scale * F.linear(input, weight.R.to(input.dtype))
    return F.linear(input, weight.W, bias) + F.linear(hidden, weight.L.to(input.dtype))


def _matmul(left: Any, right: Any) -> Any:
    # A vector beside a stack would be broadcast differently for the stacked factors.
    dims = sorted((left.ndim, right.ndim))
    if (isinstance(left, LowRankSum) and isinstance(right, LowRankSum)) or (
        dims[0] < 2 and dims[1] > 2
    ):
        return NotImplemented
    if isinstance(left, LowRankSum):
        hidden = left.scale * (left.R.to(right.dtype) @ right)
        return left.W @ right + left.L.to(right.dtype) @ hidden
    hidden = right.scale * (left @ right.L.to(left.dtype))
    return left @ right.W + hidden @ right.R.to(left.dtype)


def _grouped(x: Any, total: Any, offs: Tensor | None = None) -> Any:
    if isinstance(x, LowRankSum) or not isinstance(total, LowRankSum):
        return NotImplemented
    # On a CPU, oneDNN builds a kernel of 16 bits for each new number of tokens, which takes longer than the product.
    dtype = torch.float32 if x.device.type == "cpu" else x.dtype
    L, R = total.L.to(dtype), total.R.to(dtype)
    if lacking := -L.shape[-1] % (_ALIGNED // dtype.itemsize):
        L, R = F.pad(L, (0, lacking)), F.pad(R, (0, 0, 0, lacking))
    change = _GROUPED_MM(total.scale * _GROUPED_MM(x.to(dtype), L, offs=offs), R, offs=offs)
    return _GROUPED_MM(x, total.W, offs=offs) + change.to(x.dtype)


_METADATA = {
    *(Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.device.__get__, Tensor.ndim.__get__),  # type: ignore[attr-defined]
    *(Tensor.size, Tensor.dim, Tensor.is_floating_point, Tensor.numel),
}
"""What needs no numbers."""

_PRODUCTS: dict[Any, Callable[..., Any]] = {
    Tensor.transpose: _transpose,
    Tensor.mT.__get__: _matrix_transpose,  # type: ignore[attr-defined]
    Tensor.__getitem__: _at,
    F.linear: _linear,
    _GROUPED_MM: _grouped,
    **dict.fromkeys((torch.matmul, Tensor.matmul, torch.bmm, Tensor.bmm), _matmul),
}
"""The operations that need no sum; each returns NotImplemented for arguments that do."""

_KEYWORDS: dict[Any, tuple[str, ...]] = {
    F.linear: ("input", "weight", "bias"),
    _GROUPED_MM: ("self", "mat2", "offs"),
}
"""The arguments that an operation may also get by name, in order. With any other name it gets the sum."""


def _bound(func: Any, args: tuple, kwargs: Mapping[str, Any]) -> list[Any] | None:
    """Return all arguments of an operation in order; None if one has a name that is not known."""
    given = {name: value for name, value in kwargs.items() if value is not None}
    rest = _KEYWORDS.get(func, ())[len(args) :]
    if not given.keys() <= {*rest}:
        return None
    return [*args, *(given.get(name) for name in rest)]
