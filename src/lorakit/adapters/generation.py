"""Generation by transformers' methods, for models of which any part has adapters."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

from torch import nn

from lorakit.adapters.activation import Activation
from lorakit.adapters.entry import activation_of
from lorakit.adapters.installed import adapted_layers
from lorakit.adapters.replaced_methods import OwnMethod
from lorakit.errors import AdapterStateError


def generate(model: nn.Module, own: OwnMethod, *args: Any, **kwargs: Any) -> Any:
    """Call the model's own `generate`, all of whose forward passes keep the choice of adapters at its start."""
    with ExitStack() as stack:
        for activation in _activations(model):
            if activation.block is not None and activation.block.is_generation:
                continue  # a call within another `generate`, which has repeated the rows already
            choice = activation.choice
            if choice.unit == "row":
                choice = choice.repeated(_returned_per_row(model, args, kwargs))
            stack.enter_context(activation.generation(choice))
        return own(*args, **kwargs)


def init_continuous_batching(model: nn.Module, own: OwnMethod, *args: Any, **kwargs: Any) -> Any:
    """Call the model's own `init_continuous_batching`, as `generate_batch` and `generate` with a paged cache do.

    Raises:
        AdapterStateError: A block of `using`, `disabled`, `per_sample` or `per_token` is open: the new thread would not
            see it.
    """
    if any(activation.users_block for activation in _activations(model)):
        raise AdapterStateError(
            "Continuous batching calls the model in a new thread, which does not see per_sample, per_token, using or "
            "disabled. Leave the block, call activate() with an adapter or None, and generate again."
        )
    return own(*args, **kwargs)


def _activations(model: nn.Module) -> Iterable[Activation]:
    """Return the choices of adapters in a model: one, unless its parts were adapted separately."""
    own = activation_of(model)  # also without an adapter: one may come during a generation
    found = (adapters.activation for *_, adapters in adapted_layers(model))
    return dict.fromkeys(found if own is None else (own, *found))


def _returned_per_row(model: Any, args: tuple, kwargs: dict[str, Any]) -> int:
    """Return how many times `generate` repeats each row: for its beams, or for the sequences to return."""
    given = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
    counts = []
    for name in ("num_beams", "num_return_sequences"):
        values = (
            kwargs.get(name),
            *(getattr(c, name, None) for c in (given, getattr(model, "generation_config", None))),
        )
        counts.append(next((value for value in values if value is not None), 1))
    return max(counts)
