"""The modules and parameters of a model by their paths, without its adapters and wrappers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from lorakit.models.layers import ADAPTERS, AdapterSlot, StackedWeight, stacked_weights

_COMPILED = "_orig_mod"
"""Name of the wrapped module in a wrapper of `torch.compile`."""

_WRAPPED = (_COMPILED, "_checkpoint_wrapped_module", "_original_module")
"""Names of the wrapped module in wrappers: of `torch.compile`, PyTorch's `checkpoint_wrapper`, and Lightning's Fabric.

`named_modules` and `named_parameters` of PyTorch contain these names, and keys of a state dict contain the first.
lorakit's paths and names of parameters contain none, so they are the same before and after a part is wrapped."""


def unwrapped(module: Any) -> Any:
    """Return the module that a wrapper of `_WRAPPED` holds; anything else unchanged.

    A getter or attribute of a model may return None, or a parameter, as Perceiver's `get_input_embeddings` does.
    """
    if not isinstance(module, nn.Module):
        return module
    while (name := _wrapped_name(module)) is not None:
        module = module._modules[name]
    # accelerate's copy of a model, whose blocks it has compiled, keeps the model as a plain attribute.
    return module.__dict__.get(_COMPILED, module)


def _wrapped_name(module: nn.Module) -> str | None:
    """Return the name of the child that a module wraps; None if it is no wrapper."""
    children = module._modules
    return next((name for name in _WRAPPED if name in children), None) if children else None


def base_modules(
    model: nn.Module, *, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Module]]:
    """Yield `model.named_modules()` without adapters and wrappers, in time that does not depend on their number."""
    seen: set[int] = set()
    pending: list[tuple[str, nn.Module]] = [("", unwrapped(model))]
    while pending:
        path, module = pending.pop()
        if remove_duplicate and id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        if not module._modules:
            continue
        start = f"{path}." if path else ""
        pending += [
            (start + name, unwrapped(child))
            for name, child in reversed(list(module._modules.items()))  # another thread may add one
            if child is not None and not isinstance(child, AdapterSlot)
        ]


class LocatedModule(NamedTuple):
    """A module of a model with its path, its configuration and the module around it."""

    path: str
    module: nn.Module
    config: Any
    """Configuration of the nearest enclosing ``transformers`` model, or None. In a composite model
    (vision and text, encoder and decoder) it is that of the part."""
    parent: nn.Module


def walk(model: nn.Module) -> Iterator[LocatedModule]:
    """Yield every module of ``model`` below the root once, in model order, without adapters and wrappers.

    After the experts of a mixture come their stacked weights, as layers.
    """
    seen = {id(model)}

    def descend(parent: nn.Module, prefix: str, config: Any) -> Iterator[LocatedModule]:
        for name, child in list(parent._modules.items()):  # another thread may add one
            if child is None or isinstance(child, AdapterSlot):
                continue
            child = unwrapped(child)
            if id(child) in seen:
                continue
            seen.add(id(child))
            governing = _configuration(child) or config
            yield LocatedModule(prefix + name, child, governing, parent)
            for weight in stacked_weights(prefix + name, child):
                path = f"{prefix}{name}.{weight}"
                yield LocatedModule(path, StackedWeight(child, weight), governing, child)
            yield from descend(child, f"{prefix}{name}.", governing)

    yield from descend(model, "", _configuration(model))


def _configuration(module: nn.Module) -> Any:
    config = getattr(module, "config", None)
    return config if isinstance(getattr(config, "model_type", None), str) else None


def layers_by_path(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of `base_modules` and the stacked weights of experts, by path."""
    layers: dict[str, nn.Module] = {}
    for path, module in base_modules(model):
        layers[path] = module
        for name in stacked_weights(path, module):
            layers[f"{path}.{name}"] = StackedWeight(module, name)
    return layers


def submodule(model: nn.Module, path: str) -> nn.Module:
    """Return the module at a path of `walk`, where `model.get_submodule` may return a wrapper around it.

    Raises:
        AttributeError: The model has no such module.
    """
    parent, _, name = path.rpartition(".")
    owner = unwrapped(model.get_submodule(parent)) if parent else model
    if name not in owner._modules and name in stacked_weights(parent, owner):
        return StackedWeight(owner, name)
    return unwrapped(owner.get_submodule(name))


def without_wrappers(name: str) -> str:
    """Return PyTorch's name of a module or parameter, or a key of a state dict, without the names of `_WRAPPED`."""
    if not any(part in name for part in _WRAPPED):
        return name  # nearly all names, and a state dict has thousands
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def state_dict_key(model: nn.Module, name: str) -> str:
    """Return the key of a parameter in ``model.state_dict()``; for a path, the start of the module's keys."""
    parts: list[str] = []
    module: nn.Module | None = model
    for part in name.split("."):
        parts.append(part)
        module = module._modules.get(part) if module is not None else None
        while module is not None and (wrapped := _wrapped_name(module)) is not None:
            parts += [wrapped] if wrapped == _COMPILED else []
            module = module._modules[wrapped]
    return ".".join(parts)


def key_start(model: nn.Module, path: str) -> str:
    """Return the start of the keys of the module at a path in ``model.state_dict()``; it is empty for the root."""
    return f"{state_dict_key(model, path)}." if path else ""


def is_of_adapter(name: str) -> bool:
    """Whether a module path, parameter name or state-dict key belongs to an adapter, not to the base."""
    return f".{ADAPTERS}." in f".{name}."


def is_inside(path: str, *roots: str) -> bool:
    """Whether ``path`` is the module at one of the ``roots`` or below it."""
    return any(path == root or path.startswith(f"{root}.") for root in roots)


def parents(path: str) -> list[str]:
    """Return the paths of the modules that contain ``path``, the outermost first, without the root."""
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def natural(path: str) -> list[tuple[int, int, str]]:
    """Return a sort key that orders layers.2 before layers.10."""
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in path.split(".")]
