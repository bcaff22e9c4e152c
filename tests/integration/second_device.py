"""A device in the CPU's memory that refuses tensors of the CPU, as a GPU does, and float64, as Apple's do.

Tests can then find tensors on the wrong device on a machine without a GPU, and count how often a computation waits for
the device. A tensor of the device wraps one of the CPU, which computes. PyTorch has one place for such a backend
(PrivateUse1), so a process that imports this module keeps the device until its end.
"""

from __future__ import annotations

import traceback
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_map

NAME = "second"
GENERATOR = torch.Generator()
"""The device's own generator."""

waits: list[str] = []
"""The line of lorakit, or of a library that it calls, for each time that the CPU needed a value from the device."""

uploads: list[str] = []
"""The line for each copy of a tensor of the CPU to the device. It waits too, unless its memory is pinned."""

aten = torch.ops.aten
_MOVES = {aten._to_copy.default, aten.copy_.default}
_INDEX = {  # a CPU tensor may be the index of a GPU's
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}
_READS = {  # the CPU needs their result, or its shape
    aten._local_scalar_dense.default,
    aten._unique2.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
}


class Module:
    """The functions of ``torch.cuda`` that PyTorch and lorakit call."""

    device = staticmethod(nullcontext)

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def manual_seed(self, seed: int) -> None:
        GENERATOR.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_rng_state(self) -> Tensor:
        return GENERATOR.get_state()

    def set_rng_state(self, state: Tensor) -> None:
        GENERATOR.set_state(state)


class OnDevice(Tensor):
    """A tensor of the device."""

    held: Tensor
    """The tensor of the CPU that it wraps."""

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )

    def __init__(self, held: Tensor) -> None:
        if held.dtype == torch.float64:
            raise TypeError(f"the device {NAME} has no float64")
        self.held = held

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({self.held!r})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError(f"can't convert a tensor of the device {NAME} to numpy")
        return self.cpu().numpy()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        target = kwargs.get("device")
        leaves = target is not None and torch.device(target).type == "cpu"
        if func in _READS or leaves or _selects(func, args):
            waits.append(_caller())
        if func is aten.copy_.default and not isinstance(args[1], OnDevice):
            uploads.append(_caller())
        if func not in _MOVES:
            _require_device(func, args[:1] if func in _INDEX else args)
            _require_device(func, tuple(kwargs.values()))
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        if any(argument.name == "generator" for argument in func._schema.arguments):
            kwargs["generator"] = kwargs.get("generator") or GENERATOR
        wrappers: dict[int, OnDevice] = {}

        def unwrapped(x: Any) -> Any:
            if not isinstance(x, OnDevice):
                return x
            wrappers[id(x.held)] = x
            return x.held

        result = func(*tree_map(unwrapped, args), **tree_map(unwrapped, kwargs))
        if func is aten.copy_.default:
            return args[0]
        if leaves:
            return result

        def wrapped(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            same = wrappers.get(id(x))  # of an operation in place
            return OnDevice(x) if same is None else same

        return tree_map(wrapped, result)


def _selects(func: Any, args: Any) -> bool:
    """Whether an index is Boolean, so that the number of selected elements depends on its values."""
    return func in _INDEX and any(x is not None and x.dtype == torch.bool for x in args[1])


def _require_device(func: Any, arguments: Any) -> None:
    """Raise an error if an argument is on the CPU; numbers (0 dimensions) may be."""
    for x in arguments:
        if isinstance(x, list | tuple):
            _require_device(func, x)
        elif isinstance(x, Tensor) and not isinstance(x, OnDevice) and x.ndim:
            raise RuntimeError(f"{func} got a tensor {tuple(x.shape)} of the CPU; expected {NAME}")
        elif isinstance(x, torch.Generator) and x is not GENERATOR:
            raise RuntimeError(f"{func} got a generator of the CPU; expected one of {NAME}")


def _caller() -> str:
    """Return the innermost line of lorakit or transformers."""
    frames = [
        f
        for f in traceback.extract_stack()
        if "/lorakit/" in f.filename or "/transformers/" in f.filename
    ]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def _empty(size: Any, dtype: Any = None, **_: Any) -> Tensor:
    return OnDevice(torch.empty(size, dtype=dtype))


def _empty_strided(size: Any, stride: Any, dtype: Any = None, **_: Any) -> Tensor:
    return OnDevice(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    assert isinstance(target, OnDevice)
    if not isinstance(source, OnDevice):
        uploads.append(_caller())
    target.held.copy_(source.held if isinstance(source, OnDevice) else source)
    return target


backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Module())
_LIBRARY = torch.library.Library("aten", "IMPL")
_LIBRARY.impl("empty.memory_format", _empty, "PrivateUse1")
_LIBRARY.impl("empty_strided", _empty_strided, "PrivateUse1")
_LIBRARY.impl("_copy_from", _copy_from, "PrivateUse1")
