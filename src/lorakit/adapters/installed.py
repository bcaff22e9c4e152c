"""One adapter of a model: its method, where its modules sit, and which base tensors it trains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lorakit.adapters.activation import Activation
from lorakit.adapters.layer_adapters import LayerAdapters, add_hooks, add_module, check_free
from lorakit.errors import ConfigurationError
from lorakit.methods.method import Method
from lorakit.methods.module import AdapterModule, ModuleHook
from lorakit.models.layers import ADAPTERS
from lorakit.models.quantised import QuantisedWeight, quantised_weight


@dataclass
class InstalledAdapter:
    """Bookkeeping of one named adapter; its tensors live in the model, at `<layer>.adapters.<name>`."""

    name: str
    method: Method
    modules: dict[str, AdapterModule]
    """Path of each adapted layer, and the module on it."""
    trained: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    """Base parameters trained in full: the name of each, and every (layer path, attribute) it stands at."""
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def scales(self) -> bool:
        """Whether the whole effect is linear in a weight."""
        return not self.trained and all(module.scales for module in self.modules.values())

    @property
    def backbone_hooks(self) -> list[ModuleHook]:
        """Hooks that the adapter's modules need on the model's backbone."""
        return [hook for module in self.modules.values() for hook in module.backbone_hooks]

    def parameters(self) -> Iterator[nn.Parameter]:
        """The adapter's tensors, each once."""
        seen: set[int] = set()
        for module in self.modules.values():
            for parameter in module.parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield parameter

    def trained_tensors(self) -> dict[str, nn.Parameter]:
        """The trained copies of base parameters, by the base parameter's name."""
        return {
            name: self.modules[path].trained[attribute]
            for name, ((path, attribute), *_) in self.trained.items()
        }


def install(
    model: nn.Module,
    name: str,
    method: Method,
    modules: dict[str, AdapterModule],
    trained: list[str],
    activation: Activation,
) -> InstalledAdapter:
    """Put an adapter's modules onto the model's layers, with a copy of each base tensor it trains.

    Raises:
        ConfigurationError: A base tensor to be trained is quantised.
        AdapterStateError: Something else has our place on a layer.
    """
    refuse_quantised(model, trained)
    installed = InstalledAdapter(name, method, modules)
    slots = _slots_by_parameter(model, trained)
    for copies in slots.values():
        (first_path, attribute), *others = copies
        parameter_name = f"{first_path}.{attribute}" if first_path else attribute
        base = base_parameter(model.get_submodule(first_path), attribute)
        copy = nn.Parameter(base.detach().clone())
        for path, name_there in copies:
            modules.setdefault(path, AdapterModule()).trained[name_there] = copy
        installed.trained[parameter_name] = [(first_path, attribute), *others]
    for path in modules:  # all are checked before the first is changed
        check_free(path, model.get_submodule(path))
    for path, module in modules.items():
        owner = model.get_submodule(path.rpartition(".")[0])
        add_module(model.get_submodule(path), owner, name, module, activation)
    add_hooks(backbone_of(model), installed.backbone_hooks)
    return installed


def backbone_of(model: nn.Module) -> nn.Module:
    """Return the part of a model that computes hidden states; the model itself where it has no head."""
    return getattr(model, "base_model", model)  # type: ignore[return-value]


def base_parameter(layer: nn.Module, attribute: str) -> nn.Parameter:
    """The base's own parameter, also while a trained or merged tensor has its place."""
    adapters = layer._modules.get(ADAPTERS)
    if isinstance(adapters, LayerAdapters):
        return adapters.base(layer, attribute)
    parameter = layer._parameters[attribute]
    assert parameter is not None
    return parameter


def _slots_by_parameter(model: nn.Module, names: list[str]) -> dict[int, list[tuple[str, str]]]:
    """The places of each base parameter among `names`: names that share one tensor share one copy."""
    slots: dict[int, list[tuple[str, str]]] = {}
    for name in names:
        path, _, attribute = name.rpartition(".")
        parameter = base_parameter(model.get_submodule(path), attribute)
        slots.setdefault(id(parameter), []).append((path, attribute))
    return slots


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, LayerAdapters]]:
    """Path, layer and `adapters` child of every layer that carries an adapter."""
    for path, module in list(model.named_modules()):
        child = module._modules.get(ADAPTERS)
        if isinstance(child, LayerAdapters):
            yield path, module, child


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and tensor of every parameter of the base itself, as it was before any adapter."""
    ours = {id(m) for _, _, child in adapted_layers(model) for m in child.modules()}
    seen: set[int] = set()
    for path, module in model.named_modules():
        if id(module) in ours:
            continue
        for attribute, parameter in module._parameters.items():
            if parameter is None:
                continue
            parameter = base_parameter(module, attribute)
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield (f"{path}.{attribute}" if path else attribute), parameter


def base_weights(model: nn.Module) -> Iterator[tuple[str, Tensor | QuantisedWeight]]:
    """`base_parameters`, each quantised one as what it stands for: with the shape of the whole weight."""
    for name, parameter in base_parameters(model):
        layer = model.get_submodule(name.rpartition(".")[0])
        yield name, quantised_weight(layer, parameter) or parameter


def refuse_quantised(model: nn.Module, trained: Iterable[str]) -> None:
    """Refuse to train a base tensor that is quantised, or that its layer would round.

    Raises:
        ConfigurationError: Names the first, and what to do.
    """
    for name in trained:
        path, _, attribute = name.rpartition(".")
        layer = model.get_submodule(path)
        quantised = quantised_weight(layer, base_parameter(layer, attribute))
        if quantised is not None:
            raise ConfigurationError(
                f"'{name}' is quantised to {quantised.kind}, and quantised weights cannot be trained in full. Adapt "
                "them with LoRA (targets), or load the base in bfloat16 or float32."
            )
        if attribute == "bias" and type(layer).__module__.startswith("bitsandbytes."):
            raise ConfigurationError(
                f"'{name}' is the bias of bitsandbytes' {type(layer).__name__}, which rounds it to its input's dtype "
                "in every pass, so that small updates would be lost. Load the base by "
                "lorakit.models.loading.load_base, whose quantised layers do not, or use bias='none'."
            )
