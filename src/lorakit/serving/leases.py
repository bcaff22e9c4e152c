"""Leases of adapters, and what the adapters of a blend must have in common."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from lorakit.adapters.choice import Blend
from lorakit.errors import AdapterStateError
from lorakit.serving.engine import Receipt
from lorakit.serving.loaded import Loaded


class Holders:
    """Runs an action once the last of some holders has left.

    Args:
        action: Runs in the thread in which the last one leaves.
    """

    def __init__(self, action: Callable[[], None]) -> None:
        self._action, self._lock, self._count = action, threading.Lock(), 0

    def add(self) -> Callable[[], None]:
        """Add a holder; return the function by which it leaves, whose later calls do nothing."""
        held = [True]
        with self._lock:
            self._count += 1

        def leave() -> None:
            with self._lock:
                if not held:
                    return
                held.clear()
                self._count -= 1
                is_last = self._count == 0
            if is_last:
                self._action()

        return leave


@dataclass(eq=False)
class AdapterLease:
    """Adapters that stay loaded until `release`; a context manager releases it too."""

    blend: Blend
    receipt: Receipt
    tokenizer: PreTrainedTokenizerBase
    labels: tuple[str, ...]
    """Names of the logits of a classification head; empty for regression and for a language model."""
    outputs: int | None
    """How many of the model's logits belong to the adapter's head, the first ones; None for a language model."""
    task: str | None
    """The task that the adapter was trained for, as its folder records it."""
    _holders: Holders = field(repr=False)

    def __post_init__(self) -> None:
        self._leave = self._holders.add()

    def share(self) -> AdapterLease:
        """Return another lease of the same adapters, to be released on its own. Call it before `release`."""
        return replace(self)

    def release(self) -> None:
        """Allow the adapters to be unloaded. Later calls do nothing."""
        self._leave()

    def __enter__(self) -> AdapterLease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class _AnyAdapter:
    """An adapter that can be blended, to validate a choice before its adapters are loaded."""

    method, scales = None, True


ANY_ADAPTER = _AnyAdapter()


def common_tokenizer(held: Mapping[str, Loaded]) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the adapters of a blend."""
    (first, one), *others = held.items()
    for name, other in others:
        if other.tokenizer.digest != one.tokenizer.digest:
            raise AdapterStateError(
                f"'{first}' and '{name}' have different tokenizers, so a prompt has no common tokens for a blend of "
                "them. Request them one by one."
            )
    return one.tokenizer.tokenizer


def common_head(held: Mapping[str, Loaded]) -> tuple[int | None, tuple[str, ...]]:
    """Return number and names of the logits of the adapters of a blend."""
    (first, one), *others = held.items()
    for name, other in others:
        if (other.outputs, other.labels) != (one.outputs, one.labels):
            raise AdapterStateError(
                f"'{first}' and '{name}' predict different labels, so a blend of them has no meaning. Request them one "
                "by one."
            )
    return one.outputs, one.labels
