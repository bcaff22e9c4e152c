"""Attach a new adapter to a model."""

from __future__ import annotations

import logging
import operator
from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from lorakit.adapters.handle import Adapters, own_handle
from lorakit.adapters.installed import adapted_layers
from lorakit.adapters.statistics import running_statistics
from lorakit.errors import AdapterStateError, ConfigurationError, TargetError
from lorakit.methods.method import Method, require_method
from lorakit.methods.module import AdapterModule
from lorakit.methods.trained import require_called
from lorakit.models.dtypes import FLOATS, dtype_name
from lorakit.models.packed import require_gradients, require_own_parameters
from lorakit.models.tree import base_modules, unwrapped, without_wrappers
from lorakit.ops.seeding import seeded

_LOG = logging.getLogger(__name__)


@torch.inference_mode(False)  # the adapter's tensors outlive a caller's inference mode
def attach(
    model: nn.Module,
    method: Method,
    *,
    name: str = "default",
    dtype: torch.dtype = torch.float32,
    seed: int | None = None,
) -> Adapters:
    """Add a new adapter to a model and activate it; a model's first adapter freezes the base and drops its gradients.

    Args:
        model: Any PyTorch model; roles as targets need a supported `transformers` architecture.
        method: What to train, for example ``LoRA(rank=8, targets="attention.qv")``.
        name: Name of the adapter on this model.
        dtype: Dtype of the tensors that the method adds; float32 by default, also for a bfloat16 base. Copies of
            base tensors (`train_modules`, biases, full fine-tuning) keep the base's dtype. To train those in
            float32 too, convert them (``p.data = p.data.float()``) and run the model under `torch.autocast`, as
            `lorakit.train` does.
        seed: Seed of the random initialisation; None uses PyTorch's global generator.

    Returns:
        The model's handle; a model that already has adapters keeps its handle.

    Raises:
        TargetError: A target names no layer, or one that cannot be adapted.
        ConfigurationError: A setting does not fit the model, or an argument has another type.
        AdapterStateError: The name is taken, an adapter is merged, the model has adapters of PEFT, or no gradient
            passes through its quantised layers.
    """
    require_method(method)
    if dtype not in FLOATS:
        names = ", ".join(f"torch.{dtype_name(one)}" for one in FLOATS)
        raise ConfigurationError(f"dtype is {dtype!r}; it must be one of {names}.")
    seed = None if seed is None else operator.index(seed)  # torch rejects NumPy's
    handle = handle_for(model)
    handle.check_can_add(name)
    with handle.changing():
        with seeded(seed, (p.device for p in handle.model.parameters())):
            modules = method.modules(handle.model, dtype)
        trained_names = [*map(without_wrappers, method.trained_parameters(handle.model))]
        if not modules and not trained_names:
            raise TargetError(f"{method} trains nothing on this model.")
        _check_modules(modules)
        require_gradients(handle.model, [*modules, *(n.rpartition(".")[0] for n in trained_names)])
        if trained_names:
            require_called(handle.model, {*trained_names})
        handle.add(name, method, modules, dict.fromkeys(trained_names))
        handle.activate(name)
    if (statistic := next(iter(running_statistics(handle.model)), None)) is not None:
        _LOG.warning(
            "'%s' has running statistics. model.train() lets a forward pass change them, and an adapter's file cannot "
            "hold them: call eval() on such layers after each model.train().",
            statistic.rpartition(".")[0],
        )
    if (inner := _wrapped_model(handle.model)) is not None:
        path, kind = inner[0], type(inner[1]).__name__
        _LOG.warning(
            "%s only wraps the %s at '%s', so a saved adapter would not load on a %s alone. Attach to "
            "model.get_submodule('%s') instead.",
            *(type(handle.model).__name__, kind, path, kind, path),
        )
    return handle


def _wrapped_model(root: nn.Module) -> tuple[str, nn.Module] | None:
    """Return path and model of transformers in a root of another library that adds no parameter; None in other roots.

    The keys of an adapter's file begin at the root, which PEFT and other programs do not have.
    """
    models = (one for one in base_modules(root) if isinstance(one[1], PreTrainedModel))
    path, inner = next(models, ("", root))
    is_whole = {*inner.parameters()} == {*root.parameters()}
    return (path, inner) if path and is_whole else None


def _check_modules(modules: Mapping[str, AdapterModule]) -> None:
    """Reject modules that cannot be installed, and tensors that `save` could not write, before they are trained."""
    for path, module in modules.items():
        kind = type(module)
        if not isinstance(module, AdapterModule):
            raise ConfigurationError(
                f"The method's modules() gives {kind.__name__} for '{path}'; an AdapterModule was expected. Derive "
                "the class from lorakit.methods.AdapterModule."
            )
        for name, tensor in module.state_dict().items():
            if tensor.dtype not in FLOATS:
                raise ConfigurationError(
                    f"{kind.__name__} on '{path}' has the tensor '{name}' of {dtype_name(tensor.dtype)}, and "
                    f"an adapter's file holds {', '.join(map(dtype_name, FLOATS))}. Register it as a buffer with "
                    "persistent=False, or as float32."
                )


def handle_for(model: nn.Module) -> Adapters:
    """Return the handle of a model; create one if the model has no adapter yet.

    Raises:
        ConfigurationError: `model` is not a PyTorch module.
        AdapterStateError: A submodule of this model, or a model that contains it, has its own handle; or the model has
            adapters of PEFT; or compressed-tensors manages its parameters.
    """
    if not isinstance(model, nn.Module):
        instead = f" Load it: load_base({model!r}).model." if isinstance(model, str) else ""
        if isinstance(getattr(model, "model", None), nn.Module):
            instead = f" Pass the model that the {type(model).__name__} has: its attribute model."
        raise ConfigurationError(f"model is {model!r:.100}; it must be a PyTorch module.{instead}")
    model = unwrapped(model)
    handle = own_handle(model)
    if handle is None:
        require_own_parameters(model)
        for path, module in base_modules(model):
            if type(module).__module__.startswith("peft."):
                convert = (
                    "Convert them with lorakit.from_peft(model), or use the base without them: model.unload()."
                    if hasattr(model, "unload")
                    else "Pass the PeftModel that contains it to lorakit.from_peft. If there is none (add_adapter, "
                    "inject_adapter_in_model), save the adapters, load the base again, and lorakit.load(base, FOLDER)."
                )
                raise AdapterStateError(
                    f"The model has adapters of PEFT, on '{path or type(module).__name__}'. {convert}"
                )
        handle = Adapters(model)
    for path, _, adapters in adapted_layers(model):
        if not handle.owns(adapters):
            raise AdapterStateError(
                f"'{path}' has an adapter that was attached to another root: a part of this model, or a model that "
                "contains this one. Attach both adapters to the same root, or detach the first."
            )
    return handle
