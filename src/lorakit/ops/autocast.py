"""Autocast around operations that choose their dtypes themselves."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


def no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Switch autocast off where it is on: a custom function's products stay in the dtypes it chose."""
    if torch.is_autocast_enabled(tensor.device.type):
        return torch.autocast(tensor.device.type, enabled=False)
    return contextlib.nullcontext()


def autocast_to(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors of one device in the dtype of autocast, where it is on."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors)
