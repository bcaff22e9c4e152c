"""SHA-256 digests of weights: exact, and rounded to bfloat16.

The rounded digest recognises the same weights loaded in another dtype. `remember` keeps digests for `known_digests`,
because hashing a base takes seconds and an adapter is loaded in milliseconds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lorakit.models.dtypes import dtype_name
from lorakit.models.optimizer_steps import optimizer_steps

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
    found = _digests_in({tensor.dtype, torch.bfloat16}, tensor)
    return Digests(found[tensor.dtype], found[torch.bfloat16])


def digest(tensor: Tensor, dtype: torch.dtype) -> bytes:
    """Return the digest of a tensor's numbers in `dtype` alone, which takes half the time of `digests` or less."""
    return _digests_in({dtype}, tensor)[dtype]


def _digests_in(dtypes: set[torch.dtype], tensor: Tensor) -> dict[torch.dtype, bytes]:
    """Return the digest of a tensor's numbers in each dtype, from one pass over them."""
    shape = f"{tuple(tensor.shape)}\0"
    hashes = {dtype: hashlib.sha256(f"{dtype_name(dtype)}{shape}".encode()) for dtype in dtypes}
    for chunk in _chunks(tensor.detach()):
        for dtype, computed in hashes.items():
            computed.update(_bytes(chunk.to(dtype)))
    return {dtype: computed.digest() for dtype, computed in hashes.items()}


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


# --- digests computed before -------------------------------------------------------------------------

_SAMPLES = 32
"""Numbers of a tensor that are compared in full."""


_KNOWN: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""By the first tensor of a weight: the state of all of its tensors, and their digests."""


def remember(tensors: Sequence[Tensor], of: Digests) -> None:
    """Keep the digests of a weight that these tensors determine, until the first of them is deleted."""
    if (state := _state(tensors)) is not None:
        _KNOWN[tensors[0]] = state, of


def known_digests(tensors: Sequence[Tensor]) -> Digests | None:
    """Return the remembered digests of a weight, or None if there are none, or the weight has changed.

    A change shows in the version counter, the memory address, the number of steps of all optimizers (a fused one
    does not count a version), or in a sample of the numbers. So only one case goes unnoticed: a write through
    `tensor.data` or a NumPy view that leaves the sampled numbers equal. Use the digests for checks, and hash again
    for what is written to a file.
    """
    known = _KNOWN.get(tensors[0])
    return known[1] if known is not None and known[0] == _state(tensors) else None


def _state(tensors: Sequence[Tensor]) -> list[Any] | None:
    """Return a list that changes with the tensors; None if it could not detect a change.

    Only the first is an object of the model; bitsandbytes makes new tensors of its scales for each reader.
    """
    first = tensors[0]
    if first.is_inference() or not all(t.numel() for t in tensors):
        return None
    return [
        optimizer_steps(),
        (first._version, first.data_ptr(), first.stride()),
        *((t.dtype, tuple(t.shape), _sample(t)) for t in tensors),
    ]


def _sample(tensor: Tensor) -> bytes:
    """Return the bytes of numbers at even distances."""
    flat = tensor.detach()
    if not flat.is_contiguous():
        flat = flat.select(0, len(flat) // 2).contiguous() if flat.ndim > 1 else flat.contiguous()
    step = max(1, flat.numel() // _SAMPLES)
    chosen = flat.as_strided((flat.numel() // step,), (step,))
    return bytes(_bytes(chosen.cpu()))
