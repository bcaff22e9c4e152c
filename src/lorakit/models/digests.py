"""SHA-256 digests of weights: exact, and rounded to bfloat16.

The rounded digest recognises the same weights loaded in another dtype.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lorakit.models.dtypes import dtype_name

_CHUNK = 1 << 22
"""Numbers hashed at a time, so that a large tensor is never copied whole."""


class Digests(NamedTuple):
    """SHA-256 digests of one weight."""

    exact: bytes
    """Digest of the numbers in their own dtype."""
    bfloat16: bytes | None
    """Digest of the numbers rounded to bfloat16; None if they are not known."""


def digests(tensor: Tensor) -> Digests:
    """Hash a tensor's numbers in row-major order, with their dtype and shape."""
    name = dtype_name(tensor.dtype)
    shape = f"{tuple(tensor.shape)}\0"
    exact = hashlib.sha256(f"{name}{shape}".encode())
    rounded = (
        exact if tensor.dtype == torch.bfloat16 else hashlib.sha256(f"bfloat16{shape}".encode())
    )
    for chunk in _chunks(tensor.detach()):
        exact.update(_bytes(chunk))
        if rounded is not exact:
            rounded.update(_bytes(chunk.to(torch.bfloat16)))
    return Digests(exact.digest(), rounded.digest())


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the numbers in row-major order, in chunks on the CPU."""
    if tensor.is_contiguous():
        flat = tensor.view(-1)
        for start in range(0, flat.numel(), _CHUNK):
            yield flat[start : start + _CHUNK].cpu()
    else:
        for part in tensor if tensor.ndim > 1 else [tensor]:
            yield from _chunks(part.contiguous())


def _bytes(chunk: Tensor) -> memoryview:
    return chunk.contiguous().view(torch.uint8).numpy().data
