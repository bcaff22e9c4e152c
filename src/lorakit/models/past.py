"""Caches of a model's forward passes: keys and values, or states."""

from __future__ import annotations

from transformers import Cache


def has_past(cache: Cache) -> bool:
    """Return whether a cache holds something of earlier tokens."""
    try:
        return cache.get_seq_length() > 0
    except ValueError:  # it counts no tokens: all layers are recurrent (Mamba)
        return cache.has_previous_state()
