"""One adapter of a model: its method, its modules by layer, and the base tensors that it trains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lorakit.adapters.entry import remove_hooks
from lorakit.adapters.hooks import remove_adapter, remove_idle_hooks
from lorakit.adapters.layer_adapters import LayerAdapters
from lorakit.errors import AdapterStateError, ConfigurationError
from lorakit.methods.method import Method
from lorakit.methods.module import AdapterModule, ModuleHook
from lorakit.models.heads import backbone_of
from lorakit.models.layers import ADAPTERS
from lorakit.models.packed import (
    PackedWeight,
    packed_by,
    packed_layers,
    packed_tensor,
    packed_weight,
)
from lorakit.models.parameter_swaps import base_parameter, buffers_for, grouped_base_parameters
from lorakit.models.quantised import QuantisedWeight, quantised_weight, require_exact_layers
from lorakit.models.sharding import sharded_part
from lorakit.models.tree import base_modules, submodule, without_wrappers

_DDP_IGNORES = "_ddp_params_and_buffers_to_ignore"
"""Attribute of a model: names of parameters and buffers that DistributedDataParallel leaves alone."""


@dataclass
class InstalledAdapter:
    """Bookkeeping of one named adapter; its tensors live in the model, at `<layer>.adapters.<name>`."""

    name: str
    method: Method
    modules: dict[str, AdapterModule]
    """The adapter's modules by the path of the adapted layer."""
    trained: list[str] = field(default_factory=list)
    """Names of the base parameters trained in full; of a tied one the first."""
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def scales(self) -> bool:
        """Whether the whole effect is linear in the adapter's weight."""
        return not self.trained and all(module.scales for module in self.modules.values())

    @property
    def backbone_hooks(self) -> list[ModuleHook]:
        """Hooks that the adapter's modules declare for the model's backbone."""
        return [hook for module in self.modules.values() for hook in module.backbone_hooks]

    def read_directly(self, model: nn.Module) -> str | None:
        """Return the path of a layer with a trained copy whose weight the model may read without calling the layer."""
        paths = (
            path
            for path, _, adapters in self.layers(model)
            if adapters[self.name].trained and adapters.layout.is_read_directly
        )
        return next(paths, None) if self.trained else None

    def layers(self, model: nn.Module) -> Iterator[tuple[str, nn.Module, LayerAdapters]]:
        """Yield path, layer and `adapters` child of each layer that has the adapter.

        A layer that the user has replaced since is left out (`replaced_layers`).
        """
        for path, module in self.modules.items():
            try:
                layer = submodule(model, path)
            except AttributeError:  # a parent was replaced
                continue
            adapters = getattr(layer, ADAPTERS, None)  # also through a wrapper, as of torch.compile
            if isinstance(adapters, LayerAdapters) and adapters._modules.get(self.name) is module:
                yield path, layer, adapters

    def replaced_layers(self, model: nn.Module) -> str:
        """Return a sentence about the layers that were replaced since the adapter was attached; "" if none was."""
        present = {path for path, _, _ in self.layers(model)}
        missing = [path for path in self.modules if path not in present]
        if not missing:
            return ""
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        return (
            f"The layer '{missing[0]}'{more} was replaced after the adapter '{self.name}' was attached, so it no "
            "longer has the adapter."
        )

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the adapter's tensors, each once."""
        unique = {id(p): p for module in self.modules.values() for p in module.parameters()}
        yield from unique.values()

    def constant_buffers(self, model: nn.Module) -> set[str]:
        """Return the names of the buffers that keep base parameters while the trained copies replace them.

        A buffer inside a wrapper has two: as in lorakit's paths, and as in `model.named_buffers()`.
        """
        trained = {path: module.trained for path, module in self.modules.items() if module.trained}
        names = [name for name, _ in model.named_modules()] if trained else []
        return {
            f"{name}.{ADAPTERS}.{buffer}".removeprefix(".")
            for name in (*trained, *names)
            if (path := without_wrappers(name)) in trained
            for buffer in buffers_for(trained[path])
        }

    def trained_tensors(self) -> dict[str, nn.Parameter]:
        """Return the trained copies of base parameters, by the same names as in `trained`."""
        places = {name: name.rpartition(".") for name in self.trained}
        return {n: self.modules[path].trained[a] for n, (path, _, a) in places.items()}


def add_copies(
    model: nn.Module,
    modules: dict[str, AdapterModule],
    trained: Mapping[str, Tensor | None],
    *,
    trainable: bool,
) -> list[str]:
    """Add copies of base parameters to an adapter's modules, and return their names; of a tied one the first.

    Args:
        model: The base.
        modules: By the path of the layer. It receives a plain `AdapterModule` for each layer that only has copies.
        trained: The numbers of each copy by the name of the parameter; None copies the base's.
        trainable: Whether the copies require a gradient.
    """
    names: list[str] = []
    copies: dict[int, nn.Parameter] = {}  # the names of a tied parameter share one
    seen: set[tuple[int, str]] = set()
    for name, numbers in trained.items():
        path, _, attribute = name.rpartition(".")
        layer = submodule(model, path)
        if (id(layer), attribute) in seen:  # one module at two paths
            continue
        seen.add((id(layer), attribute))
        base = base_parameter(layer, attribute)
        if id(base) not in copies:
            copy = base.detach().clone()
            if numbers is not None:
                copy.copy_(numbers)
            copies[id(base)] = nn.Parameter(copy, requires_grad=trainable)
            names.append(name)
        modules.setdefault(path, AdapterModule()).add_trained(attribute, copies[id(base)])
    return names


def check_installable(
    model: nn.Module, modules: dict[str, AdapterModule], trained_names: Iterable[str]
) -> None:
    """Check whether `Adapters.add` can add an adapter's modules and trained copies; nothing is changed.

    Raises:
        ConfigurationError: A base tensor to be trained is quantised.
        AdapterStateError: accelerate has offloaded a layer.
    """
    require_exact_layers(model)
    refuse_quantised(model, trained_names)
    tensors: dict[str, Tensor | None] = {p: next(m.parameters(), None) for p, m in modules.items()}
    for name in trained_names:
        path, _, attribute = name.rpartition(".")
        tensors[path] = base_parameter(submodule(model, path), attribute)
    _refuse_offloaded(model, tensors)


def _refuse_offloaded(model: nn.Module, tensors: dict[str, Tensor | None]) -> None:
    """Reject an adapter's tensors, by layer, on the meta device, unless the whole model is only planned there.

    accelerate brings the weights of a layer back for each call, but not those of the adapter.
    """
    offloaded = (path for path, tensor in tensors.items() if tensor is not None and tensor.is_meta)
    path = next(offloaded, None)
    if path is not None and any(hasattr(module, "_hf_hook") for _, module in base_modules(model)):
        raise AdapterStateError(
            f"accelerate has offloaded '{path}' (device_map, cpu_offload or disk_offload), and an adapter's tensors "
            "cannot be offloaded. Load the base without offloading, quantised if it is too large, or adapt layers that "
            "are not offloaded."
        )


def ignore_in_ddp(model: nn.Module, adapter: InstalledAdapter) -> None:
    """Let DistributedDataParallel leave the adapter's constant buffers alone: it would broadcast them in each pass."""
    if constant := adapter.constant_buffers(model):
        setattr(model, _DDP_IGNORES, constant.union(getattr(model, _DDP_IGNORES, ())))


def uninstall(
    model: nn.Module, adapter: InstalledAdapter, others: Iterable[InstalledAdapter]
) -> None:
    """Remove an adapter's modules from the model, with the hooks that no other adapter needs."""
    for _, layer, adapters in adapter.layers(model):
        remove_adapter(layer, adapters, adapter.name)
    if hooks := {*adapter.backbone_hooks}:
        needed = {hook for other in others for hook in other.backbone_hooks}
        remove_hooks(backbone_of(model), *(hook.run for hook in hooks - needed))
    if constant := adapter.constant_buffers(model):
        ignored = set(model.__dict__.pop(_DDP_IGNORES, ())) - constant
        ignored.update(*(other.constant_buffers(model) for other in others))
        if ignored:
            setattr(model, _DDP_IGNORES, ignored)
    remove_idle_hooks(model)


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, LayerAdapters]]:
    """Yield path, layer and `adapters` child of every layer that has an adapter."""
    for path, module in list(base_modules(model)):
        child = module._modules.get(ADAPTERS)
        if isinstance(child, LayerAdapters):
            yield path, module, child


def require_unsharded(model: nn.Module) -> None:
    """Raise an AdapterStateError if the model is sharded over processes, which would ignore a merged weight."""
    if (sharded := sharded_part(model)) is not None:
        raise AdapterStateError(
            f"'{sharded}' is sharded over processes (FSDP2 or ZeRO-3), so no adapter can be merged into the weights, "
            "as merge and save_pretrained do. Save the adapter with adapters.save(folder), and merge it into a whole "
            "model: `lorakit merge FOLDER OUTPUT`, or load() and merge() on a base that is not sharded. In Trainer, "
            'set save_strategy="no".'
        )


def unmergeable(model: nn.Module, names: Iterable[str] | None = None) -> Iterator[tuple[str, str]]:
    """Yield name and layer path of each effect that is not a change of weights; by default of the active adapters."""
    for path, _, adapters in adapted_layers(model):
        wanted = adapters.activation.active.names if names is None else names
        yield from ((n, path) for n in wanted if n in adapters and not adapters[n].merges)


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield name and tensor of every parameter of the base, as before the first adapter."""
    for (name, *_), _, parameter in grouped_base_parameters(model):
        yield name, parameter


def base_weights(model: nn.Module) -> Iterator[tuple[str, Tensor | QuantisedWeight | PackedWeight]]:
    """Yield `base_parameters`, each quantised one as its kind of weight, with the unpacked shape.

    Of a linear layer that another library than bitsandbytes has quantised, there are the weight and the bias alone, and
    the weight includes a bias that is no parameter.
    """
    packed = {id(layer): (path, layer, kind) for path, layer, kind in packed_layers(model)}
    for path, layer, kind in packed.values():
        yield f"{path}.weight", packed_weight(layer, kind)
    for (name, *_), layer, parameter in grouped_base_parameters(model):
        attribute = name.rpartition(".")[2]
        if id(layer) in packed and attribute != "bias":
            continue
        if (kind := packed_by(layer, attribute)) is not None:
            yield name, packed_tensor(parameter, kind)
        else:
            yield name, quantised_weight(layer, parameter) or parameter


def packed_part(model: nn.Module) -> str | None:
    """Return a part of the base that another library than bitsandbytes has quantised; None if there is none."""
    for name, weight in base_weights(model):
        if isinstance(weight, PackedWeight):
            return f"'{name}' ({weight.kind})"
    for path, module in base_modules(model):
        # Some experts keep their numbers neither in parameters nor in buffers.
        method = getattr(module.__dict__.get("hf_quantizer"), "quantization_config", None)
        name = getattr(getattr(method, "quant_method", None), "value", "bitsandbytes")
        if name != "bitsandbytes":
            return f"'{path or type(module).__name__}' ({name})"
    return None


def refuse_quantised(model: nn.Module, trained: Iterable[str]) -> None:
    """Reject full training of a base tensor that is quantised, or that its layer rounds.

    Raises:
        ConfigurationError: With the name of the first such tensor, and the fix.
    """
    for name in trained:
        path, _, attribute = name.rpartition(".")
        layer = submodule(model, path)
        kind = packed_by(layer, attribute)
        if kind is None and (
            quantised := quantised_weight(layer, base_parameter(layer, attribute))
        ):
            kind = quantised.kind
        if kind is not None:
            raise ConfigurationError(
                f"'{name}' belongs to a quantised layer ({kind}), and quantised weights cannot be trained in full. "
                "Adapt them with LoRA (targets), or load the base in bfloat16 or float32."
            )
        if attribute == "bias" and type(layer).__module__.startswith("bitsandbytes."):
            raise ConfigurationError(
                f"'{name}' is the bias of bitsandbytes' {type(layer).__name__}, which rounds it to its input's dtype "
                "in every pass, so small updates would be lost. Load the base with lorakit.models.loading.load_base, "
                "whose quantised layers do not round it, or use bias='none'."
            )
