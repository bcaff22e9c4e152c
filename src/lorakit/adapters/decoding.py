"""Decoding steps: a few tokens without gradients.

In such a step the overhead of each operation exceeds its arithmetic. So the adapters of all tokens share batched
products of stacked matrices (`adapters.stacks`). The first step of a generation records the dtype of each layer's
input. Later steps use the stacks until a tensor of an adapter changes.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from lorakit.adapters.blend_factors import LayerAdaptersLike
from lorakit.adapters.choice import Choice
from lorakit.adapters.row_factors import RowFactors
from lorakit.adapters.stacked_products import SharedInput
from lorakit.adapters.stacks import Arrangement, Stacks
from lorakit.models.past import has_past

FEW_TOKENS = 32
"""The most tokens of a decoding step with the same adapters for all. More are faster in the dtype of the base than in
that of the stacks."""

FEW_MIXED_TOKENS = 512
"""The most tokens of a decoding step with different adapters."""

_INPUTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


class Decoding:
    """The decoding steps of one model."""

    def __init__(self) -> None:
        self._stacks: Stacks | None = None
        self.row_factors = RowFactors()
        """DoRA factors, cached since the last prompt."""

    def begin(
        self, choice: Choice, args: tuple, kwargs: dict[str, Any], *, is_active: bool
    ) -> Step | None:
        """Return the decoding step that a forward pass with these arguments is, or None.

        A prompt discards the stacks and the row factors. So an edit through `tensor.data`, which PyTorch does not
        count, acts from the next prompt on. A prompt with a choice by token keeps the stacks, and with `unchanged` the
        factors too: a server computes such passes between the steps.

        Args:
            choice: The adapters of the pass.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            is_active: Whether `activate` made the choice.
        """
        x = None if torch.is_grad_enabled() else _input(args, kwargs)
        is_short = x is not None and x.shape[1:2].numel() <= FEW_TOKENS
        is_unchanged = choice.unit == "token" and choice.unchanged
        if not is_unchanged and not (is_short and _continues(kwargs)):
            self.row_factors = RowFactors()
        shape = None if x is None else _shape_of_step(choice, x, kwargs)
        if shape is None:
            if choice.unit != "token":
                self._stacks = None
            return None
        if not choice.names:
            return None
        stacks = self._stacks = self._stacks or Stacks()
        step = Step(stacks)
        arrangement = stacks.arrange(choice, shape, step, is_active=is_active)
        if arrangement is None:
            return None
        step.arrangement = arrangement
        return step

    def remove(self, name: str) -> None:
        """Forget an adapter that leaves the model."""
        if self._stacks is not None:
            self._stacks.remove(name)


class Step:
    """One decoding step. Layers are identified by their child module `adapters`."""

    arrangement: Arrangement
    """How the stacks compute the batch."""

    def __init__(self, stacks: Stacks) -> None:
        self.thread = threading.get_ident()
        self._stacks = stacks
        self._x: Tensor | None = None
        self._version: int | None = None
        self._shared: SharedInput | None = None

    def adapt(self, adapters: LayerAdaptersLike, x: Tensor, output: Tensor) -> Tensor | None:
        """Return the layer's output with the effect of its adapters; None if the stacks cannot compute it."""
        arrangement = self.arrangement
        part = arrangement.parts.get(adapters)
        if part is None:
            self._stacks.record_dtype(adapters, x)
            return None
        in_order = x.shape[:-1] == arrangement.shape and not adapters.replaced
        if (
            torch.is_grad_enabled()
            or not (arrangement.is_active or in_order)
            or x.dtype.itemsize > part.input_dtype.itemsize
        ):
            return None
        version = None if x.is_inference() else x._version
        if self._shared is None or x is not self._x or version is None or version != self._version:
            self._shared = SharedInput(x, arrangement.rows)
            self._x, self._version = x, version
        adapted = output + self._shared.delta(part, output.dtype)
        return adapted if part.tokens is None else torch.where(part.tokens, adapted, output)


def _shape_of_step(choice: Choice, x: Tensor, kwargs: dict[str, Any]) -> torch.Size | None:
    """Return (batch, length) of a forward pass that continues earlier ones by a few tokens; else None.

    With a choice by token, any few tokens without autocast are such a pass: its cache may be of any kind.
    """
    if torch.is_autocast_enabled(x.device.type):
        return None
    shape = x.shape[:2]
    if shape.numel() > (FEW_MIXED_TOKENS if choice.whole is None else FEW_TOKENS):
        return None
    return shape if choice.unit == "token" or _continues(kwargs) else None


def _continues(kwargs: dict[str, Any]) -> bool:
    """Return whether a forward pass has a cache with tokens of earlier ones."""
    cache = next((value for value in kwargs.values() if isinstance(value, Cache)), None)
    return cache is not None and has_past(cache)


def _input(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """Return the tokens or vectors that enter the model, (batch, length, ...)."""
    x = next((kwargs[name] for name in _INPUTS if kwargs.get(name) is not None), None)
    x = args[0] if x is None and args else x
    return x if isinstance(x, Tensor) else None
