"""Putting a new adapter on a model."""

from __future__ import annotations

import torch
from torch import nn

from lorakit.adapters.handle import Adapters, handle_of, uncompiled
from lorakit.adapters.installed import adapted_layers
from lorakit.errors import AdapterStateError, TargetError
from lorakit.methods.method import Method
from lorakit.ops import seeded


def attach(
    model: nn.Module,
    method: Method,
    *,
    name: str = "default",
    dtype: torch.dtype = torch.float32,
    seed: int | None = None,
) -> Adapters:
    """Add a new adapter to a model, freeze the base, and let the adapter act.

    Args:
        model: Any PyTorch model; roles as targets need a `transformers` architecture that is known.
        method: What to train, for example ``LoRA(rank=8, targets="attention.qv")``.
        name: Name of the adapter on this model.
        dtype: Dtype of the tensors that the method adds; float32 masters also over a bfloat16 base. Copies of
            base tensors (`train_modules`, biases, full fine-tuning) have the base's dtype, in which its layers
            compute. To train those as float32 masters too, convert them (``p.data = p.data.float()``) and run
            the model under `torch.autocast`; `lorakit.train` does.
        seed: Seed of the random start; None draws from PyTorch's global generator.

    Returns:
        The model's handle; the same one as before if the model already carries adapters.

    Raises:
        TargetError: A target names no layer, or one that cannot be adapted.
        ConfigurationError: A setting does not fit the model.
        AdapterStateError: The name is taken, or an adapter is merged.
    """
    handle = handle_for(model)
    handle.check_can_add(name)
    with handle.deactivated():
        with seeded(seed, (p.device for p in handle.model.parameters())):
            modules = method.modules(handle.model, dtype)
        trained = method.trained_parameters(handle.model)
        if not modules and not trained:
            raise TargetError(f"{method} trains nothing on this model.")
        handle.add(name, method, modules, trained)
    handle.activate(name)
    return handle


def handle_for(model: nn.Module) -> Adapters:
    """The handle of a model, a new one where it carries no adapter yet.

    Raises:
        AdapterStateError: Adapters sit on a part of the model, or on a model that this is a part of.
    """
    model = uncompiled(model)
    handle = handle_of(model) or Adapters(model)
    for path, _, adapters in adapted_layers(model):
        if not handle.owns(adapters):
            raise AdapterStateError(
                f"'{path}' carries an adapter that was attached to another root: a part of this model, or a model "
                "that this one is a part of. Attach both to the same one, or detach the first."
            )
    return handle
