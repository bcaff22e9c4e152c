"""Convert a live PEFT model."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorakit.adapters import formats
from lorakit.adapters.attach import handle_for
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.adapters.handle import Adapters
from lorakit.adapters.loading import build_modules, check_base, usable_name
from lorakit.errors import AdapterStateError, LorakitError


@torch.inference_mode(False)  # the adapters' tensors outlive a caller's inference mode
def from_peft(peft_model: Any) -> Adapters:
    """Convert a live PEFT model: restore its base's own modules and attach its adapters with lorakit.

    An adapter whose name lorakit cannot use gets another one, and a warning says so. The PEFT model is not changed
    before its adapters have been written to a temporary folder and read by lorakit.

    Args:
        peft_model: A `peft.PeftModel` with one or more unmerged LoRA adapters. It cannot be used afterwards.

    Returns:
        The handle of the base model, ``handle.model``, with the same active adapters; none if they are disabled.

    Raises:
        AdapterFileError: An adapter uses an option of PEFT that lorakit does not support, or does not fit the base.
        AdapterStateError: The model is no `PeftModel` with an adapter, or has a merged one. Or a scaling was changed by
            `set_scale`. Or several adapters are active, and the effect of one is not linear in a weight.
    """
    names = list(getattr(peft_model, "peft_config", {}))
    if not names or not hasattr(peft_model, "unload"):  # transformers has a peft_config of its own
        raise AdapterStateError(
            f"{type(peft_model).__name__} is no PeftModel with an adapter. Pass the model that get_peft_model or "
            "PeftModel.from_pretrained returned. If add_adapter or inject_adapter_in_model has added the adapters, "
            "save them, load the base again, and lorakit.load(base, FOLDER)."
        )
    status = peft_model.get_model_status()
    if status.merged_adapters or status.enabled == "irregular":
        raise AdapterStateError(
            "The PEFT model has an adapter merged into its weights, or disabled on some layers only. PEFT can only "
            "unmerge by subtraction, which rounds: reload the base and the adapter's folder, or call unmerge_adapter() "
            "first. For the other, call enable_adapter_layers() or disable_adapter_layers() of its base_model."
        )
    with tempfile.TemporaryDirectory() as folder:
        peft_model.save_pretrained(folder, selected_adapters=names)
        stored = {name: _read(Path(folder), name) for name in names}
    _require_all_of(peft_model, stored)
    named = _usable_names(names)
    active = [named[name] for name in (peft_model.active_adapters if status.enabled else ())]
    _restore_originals(peft_model)
    handle = handle_for(peft_model.unload())
    # PEFT froze them without a record of their previous flags.
    for parameter in handle.model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    with handle.changing():
        for name, adapter in stored.items():
            adapter.notices += _notices(adapter, name, named[name])
            check_base(handle.model, adapter, allow_other_base=False, tokenizer=None)
            trainable = bool(status.requires_grad[name])
            modules = build_modules(handle.model, adapter, trainable=trainable)
            handle.add(
                named[name],
                adapter.method,
                modules,
                adapter.trained,
                trainable=trainable,
                provenance=adapter.provenance,
            )
        handle.activate(dict.fromkeys(active, 1.0) or None)
    return handle


def _read(folder: Path, name: str) -> StoredAdapter:
    """Return an adapter that `save_pretrained` wrote. Errors name the adapter instead of its temporary folder."""
    path = folder if name == "default" else folder / name
    try:
        return replace(formats.read(path), path=name)
    except LorakitError as error:
        raise type(error)(str(error).replace(f"'{path}", f"'{name}")) from error


def _require_all_of(peft_model: Any, stored: Mapping[str, StoredAdapter]) -> None:
    """Reject what the files of the adapters do not hold: scalings that `set_scale` has changed, and omitted layers."""
    layers = {p: m for p, m in peft_model.named_modules() if "base_layer" in m._modules}
    for name, adapter in stored.items():
        if len(adapter.layers) < sum(name in layer.scaling for layer in layers.values()):
            raise AdapterStateError(
                f"PEFT saves only a part of the adapter '{name}', because another one has the name of a module. Give "
                "that adapter another name."
            )
    for path, layer in layers.items():
        for name, scaling in layer.scaling.items():
            rank, alpha = layer.r[name], layer.lora_alpha[name]
            root = math.sqrt(rank) if peft_model.peft_config[name].use_rslora else rank
            if not math.isclose(scaling, alpha / root, rel_tol=1e-6):
                raise AdapterStateError(
                    f"'{name}' has the scaling {scaling:g} on '{path}', and its configuration gives {alpha / root:g}: "
                    f"set_scale or scale_layer has changed it. Call set_scale('{name}', 1) on each such layer first. "
                    f"To scale the converted adapter: adapters.activate({{'{name}': {scaling * root / alpha:g}}})."
                )


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


def _restore_originals(peft_model: nn.Module) -> None:
    """Restore the modules that PEFT trains copies of (modules_to_save); PEFT's unload keeps the copies."""
    for path, wrapper in list(peft_model.named_modules()):
        original = getattr(wrapper, "original_module", None)
        if isinstance(original, nn.Module) and hasattr(wrapper, "modules_to_save"):
            parent, _, name = path.rpartition(".")
            setattr(peft_model.get_submodule(parent), name, original)
