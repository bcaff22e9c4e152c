"""A stream of random bits for each key, which depends on the key alone: SplitMix64 (Steele, Lea and Flood 2014)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

GAMMA = 0x9E3779B97F4A7C15 - 2**64
"""Distance of the generator's states, as an int64."""

FACTORS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)

CHUNK = 2**15
"""Words that a thread mixes at a time, so that they stay in its cache."""


def mixed(x: Tensor) -> Tensor:
    """Replace int64 numbers by their hashes, in place: SplitMix64's function of its state."""
    shifted = torch.empty_like(x)
    for shift, factor in zip((30, 27, 31), (*FACTORS, 1), strict=True):
        torch.bitwise_right_shift(x, shift, out=shifted)
        # torch copies the sign into the upper bits.
        x.bitwise_xor_(shifted.bitwise_and_(2 ** (64 - shift) - 1))
        if factor != 1:
            x.mul_(factor)
    return x


def above(keys: Tensor, thresholds: Tensor) -> Tensor:
    """Draw W random bytes for each of N keys, and compare them with thresholds.

    Args:
        keys: Shape (N,), int64. Byte w of a key does not depend on N or W.
        thresholds: Shape (W,), between 0 and 256.

    Returns:
        Bool, shape (N, W), True where the byte is at least its threshold.
    """
    width, words = len(thresholds), -(-len(thresholds) // 8)
    states = _states(words, keys.device)
    found = torch.empty(len(keys), width, dtype=torch.bool, device=keys.device)
    rows = len(keys)
    if keys.device.type == "cpu":
        rows = max(CHUNK * torch.get_num_threads() // max(words, 1), 1)
    for at in range(0, len(keys), max(rows, 1)):
        part = slice(at, at + rows)
        drawn = mixed(keys[part, None] + states).view(torch.uint8)
        torch.ge(drawn[:, :width], thresholds, out=found[part])
    return found


@lru_cache
def _states(count: int, device: torch.device) -> Tensor:
    """Return the first states of the generator of key 0."""
    return torch.arange(1, count + 1, device=device).mul_(GAMMA)
