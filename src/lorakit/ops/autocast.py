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
