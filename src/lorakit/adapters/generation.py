"""Generation by transformers' methods, for models of which any part has adapters."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

from torch import nn

from lorakit.adapters.activation import Activation, Block
from lorakit.adapters.entry import activation_of
from lorakit.adapters.installed import adapted_layers
from lorakit.adapters.replaced_methods import OwnMethod
from lorakit.adapters.slots import Slots


def generate(model: nn.Module, own: OwnMethod, *args: Any, **kwargs: Any) -> Any:
    """Call the model's own `generate` in a block: all its forward passes have the choice of adapters at its start."""
    with ExitStack() as stack:
        for activation in _activations(model):
            block = activation.block
            if activation.merged is not None or (block is not None and block.is_generation):
                continue  # a call within another `generate` has repeated the rows already
            choice = activation.choice
            if choice.unit == "row":
                choice = choice.repeated(_returned_per_row(model, args, kwargs))
            slots = None if block is None else block.slots
            stack.enter_context(
                activation.opened(Block(choice, slots or Slots(), is_generation=True))
            )
        return own(*args, **kwargs)


def _activations(model: nn.Module) -> Iterable[Activation]:
    """Return the choices of adapters in a model: one, unless its parts were adapted separately."""
    own = activation_of(model)
    found = (adapters.activation for *_, adapters in adapted_layers(model))
    return dict.fromkeys(found if own is None else (own, *found))


def _returned_per_row(model: Any, args: tuple, kwargs: dict[str, Any]) -> int:
    """Return how many times `generate` repeats each row: for its beams, or for the sequences to return."""
    given = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
    configs = (given, getattr(model, "generation_config", None))
    counts = []
    for name in ("num_beams", "num_return_sequences"):
        values = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
        counts.append(next((value for value in values if value is not None), 1))
    return max(counts)
