"""Autocast and accumulation dtypes of the custom autograd functions."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


def no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Disable autocast if it is on, so that a custom function's products keep the dtypes it chose."""
    if torch.is_autocast_enabled(tensor.device.type):
        return torch.autocast(tensor.device.type, enabled=False)
    return contextlib.nullcontext()


def autocast_to(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast tensors of one device to the autocast dtype, if autocast is on."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device_type)) for tensor in tensors)


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """Return float32, or the dtype that the tensors promote to if that is wider."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
