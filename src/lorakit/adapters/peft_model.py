"""Convert a live PEFT model."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorakit.adapters import formats
from lorakit.adapters.attach import handle_for
from lorakit.adapters.choice import choice_for_batch
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.adapters.handle import Adapters
from lorakit.adapters.installed import InstalledAdapter, check_installable
from lorakit.adapters.loading import build_modules, check_base, install, usable_name
from lorakit.errors import AdapterStateError, LorakitError


@torch.inference_mode(False)  # the adapters' tensors outlive a caller's inference mode
def from_peft(peft_model: Any) -> Adapters:
    """Convert a live PEFT model: restore its base's own modules and attach its adapters with lorakit.

    An adapter whose name lorakit cannot use gets another one, and a warning says so. After an error the PEFT model is
    as it was.

    Args:
        peft_model: A `peft.PeftModel` with one or more unmerged LoRA adapters. It cannot be used afterwards.

    Returns:
        The handle of the base model, ``handle.model``, with the same active adapters; none if they are disabled.

    Raises:
        AdapterFileError: An adapter uses an option of PEFT that lorakit does not support, or does not fit the base.
        AdapterStateError: The model is no `PeftModel` with an adapter, or has a merged one. Or a scaling was changed by
            `set_scale`, or only some layers have their adapters disabled. Or several adapters are active, and the
            effect of one is not linear in a weight.
    """
    names = list(getattr(peft_model, "peft_config", {}))
    if not names or not hasattr(peft_model, "unload"):  # transformers has a peft_config of its own
        raise AdapterStateError(
            f"{type(peft_model).__name__} is no PeftModel with an adapter. Pass the model that get_peft_model or "
            "PeftModel.from_pretrained returned. If add_adapter or inject_adapter_in_model has added the adapters, "
            "save them, load the base again, and lorakit.load(base, FOLDER)."
        )
    if any(getattr(module, "merged_adapters", None) for module in peft_model.modules()):
        raise AdapterStateError(
            "The PEFT model has an adapter merged into its weights, and PEFT can only unmerge it by subtraction, which "
            "rounds. Call unmerge_adapter() first, or reload the base and the adapter's folder."
        )
    with tempfile.TemporaryDirectory() as folder:
        peft_model.save_pretrained(folder, selected_adapters=names)
        stored = {name: _read(Path(folder), name) for name in names}
    wrappers = {path: m for path, m in peft_model.named_modules() if _inner(m) is not None}
    _require_configured_scalings(peft_model, wrappers)
    active = [] if _are_disabled(wrappers.values()) else list(peft_model.active_adapters)
    base = _unwrapped(peft_model.get_base_model(), {})
    named = _usable_names(names)
    converted: dict[str, InstalledAdapter] = {}
    for name, adapter in stored.items():
        handle_for(base).check_can_add(named[name])
        adapter.notices += _notices(adapter, name, named[name])
        check_base(base, adapter, name, allow_other_base=False, tokenizer=None)
        modules = build_modules(base, adapter, f"'{name}'")
        trained = list(adapter.trained)
        check_installable(base, modules, trained)
        converted[name] = InstalledAdapter(named[name], adapter.method, modules, trained)
    trainable = {name for name in names if _is_trainable(wrappers.values(), name)}
    choice = {named[name]: 1.0 for name in active}
    choice_for_batch(choice, {one.name: one for one in converted.values()}.__getitem__)
    # All checks have passed, so the PEFT model may be changed.
    _restore_originals(peft_model)
    base = peft_model.unload()
    for parameter in base.parameters():  # PEFT froze them without a record of their previous flags
        parameter.requires_grad_(parameter.is_floating_point())
    handle = handle_for(base)
    with handle.changing():
        for name, one in converted.items():
            install(handle, stored[name], one.modules, one.name, trainable=name in trainable)
        handle.activate(choice)
    return handle


def _read(folder: Path, name: str) -> StoredAdapter:
    """Return an adapter that `save_pretrained` wrote. Errors name the adapter instead of its temporary folder."""
    path = folder if name == "default" else folder / name
    try:
        return formats.read(path)
    except LorakitError as error:
        raise type(error)(str(error).replace(f"'{path}", f"'{name}")) from error


# --- the state of a PEFT model --------------------------------------------------------------------------


def _require_configured_scalings(peft_model: Any, wrappers: dict[str, Any]) -> None:
    """Reject a scaling that `set_scale` or `scale_layer` has changed: an adapter's configuration does not hold it."""
    for path, layer in wrappers.items():
        if "base_layer" not in layer._modules:
            continue  # it has a copy of a module (modules_to_save), and the attributes of the original
        for name, scaling in getattr(layer, "scaling", {}).items():
            rank, alpha = layer.r[name], layer.lora_alpha[name]
            expected = alpha / (
                math.sqrt(rank) if peft_model.peft_config[name].use_rslora else rank
            )
            if not math.isclose(scaling, expected, rel_tol=1e-6):
                raise AdapterStateError(
                    f"'{name}' has the scaling {scaling:g} on '{path}', and its configuration gives {expected:g}: "
                    f"set_scale or scale_layer has changed it. Call set_scale('{name}', 1) on each such layer first. "
                    f"To scale the converted adapter: adapters.activate({{'{name}': {scaling / expected:g}}})."
                )


def _are_disabled(wrappers: Iterable[Any]) -> bool:
    """Return whether `disable_adapter_layers` has disabled the adapters."""
    flags = {bool(wrapper.disable_adapters) for wrapper in wrappers}
    if len(flags) > 1:
        raise AdapterStateError(
            "Some layers of the PEFT model have their adapters disabled, and others have not. Call its "
            "enable_adapter_layers() or disable_adapter_layers() first."
        )
    return flags == {True}


def _is_trainable(wrappers: Iterable[Any], name: str) -> bool:
    """Return whether a tensor of the adapter requires a gradient."""
    for wrapper in wrappers:
        for attribute in wrapper.adapter_layer_names:
            held = getattr(wrapper, attribute, {})
            if name not in held:
                continue
            part = held[name]
            tensors = part.parameters() if isinstance(part, nn.Module) else [part]
            if any(tensor.requires_grad for tensor in tensors):
                return True
    return False


def _usable_names(names: Sequence[str]) -> dict[str, str]:
    """Return the adapter's name in lorakit by its name in PEFT; a name that can be kept is."""
    usable: dict[str, str] = {}
    for name in sorted(names, key=lambda name: usable_name(name) != name):
        own = usable_name(name)
        while own in usable.values():
            own += "_2"
        usable[name] = own
    return usable


def _notices(adapter: StoredAdapter, name: str, own: str) -> list[str]:
    """Return what the user should know about the conversion of one adapter."""
    notices = []
    if own != name:
        notices.append(f"lorakit cannot use this name, so the adapter is named '{own}'.")
    bias = (adapter.peft_config or {}).get("bias", "none")
    if bias != "none":
        notices.append(
            f"PEFT has trained the biases of the base itself (bias='{bias}'), so activate(None) does not give the "
            "original base. To get that, save this adapter and load it on the base from its file."
        )
    return notices


# --- the base -------------------------------------------------------------------------------------------


def _inner(module: nn.Module) -> nn.Module | None:
    """Return the module of the base that a module of PEFT wraps; None for other modules."""
    if not type(module).__module__.startswith("peft."):
        return None
    inner = module._modules.get("base_layer")
    return module._modules.get("original_module") if inner is None else inner


def _unwrapped(module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    """Return a copy of a module without the wrappers of PEFT, which shares all tensors; the module is not changed.

    `done` holds the copies made so far, by the `id` of the original.
    """
    while (inner := _inner(module)) is not None:
        module = inner
    if id(module) not in done:
        copy = done[id(module)] = object.__new__(type(module))
        copy.__dict__.update(module.__dict__)
        copy.__dict__["_modules"] = {
            name: None if child is None else _unwrapped(child, done)
            for name, child in module._modules.items()
        }
    return done[id(module)]


def _restore_originals(peft_model: nn.Module) -> None:
    """Restore the modules that PEFT trains copies of (modules_to_save); PEFT's unload keeps the copies."""
    for path, wrapper in list(peft_model.named_modules()):
        original = getattr(wrapper, "original_module", None)
        if isinstance(original, nn.Module) and hasattr(wrapper, "modules_to_save"):
            parent, _, name = path.rpartition(".")
            setattr(peft_model.get_submodule(parent), name, original)
