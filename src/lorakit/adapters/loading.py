"""An adapter from disk, or from PEFT, put on a model."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters import formats
from lorakit.adapters.attach import handle_for
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.adapters.formats.stored_layer import StoredLayer
from lorakit.adapters.handle import Adapters, handle_of
from lorakit.adapters.installed import base_parameters
from lorakit.errors import AdapterFileError, AdapterStateError, WrongBaseError, nearest
from lorakit.methods.combined import lora_of, parts
from lorakit.methods.lora import LoRA
from lorakit.methods.lora.convolution import ConvLoRA, LoralibConvLoRA
from lorakit.methods.lora.kinds import kind_of, tied_head
from lorakit.methods.lora.layer import LoRALayer
from lorakit.methods.module import AdapterModule
from lorakit.ops import seeded

_LOG = logging.getLogger(__name__)


def load(
    model: nn.Module,
    path: str | Path,
    *,
    name: str | None = None,
    allow_other_base: bool = False,
    alpha: float | None = None,
    trainable: bool = False,
) -> Adapters:
    """Put an adapter from disk onto a model, checked against it, and let it act.

    Args:
        model: The base the adapter was made for.
        path: A folder of lorakit or PEFT, or a loralib file.
        name: Its name on this model; None takes the folder's.
        allow_other_base: Load although the file records another base. The decision is logged.
        alpha: The constant of a loralib file, which does not record it.
        trainable: Go on training it; otherwise its tensors require no gradient.

    Returns:
        The model's handle; the same one as before if the model already carries adapters.

    Raises:
        AdapterFileError: The file is damaged or unsafe, or its tensors do not fit the model's layers.
        WrongBaseError: It was made for another base.
        AdapterStateError: The name is taken, or an adapter is merged.
    """
    return load_stored(
        model,
        formats.read(path, alpha=alpha),
        path,
        name=name,
        allow_other_base=allow_other_base,
        trainable=trainable,
    )


def load_stored(
    model: nn.Module,
    stored: StoredAdapter,
    path: str | Path,
    *,
    name: str | None = None,
    allow_other_base: bool = False,
    trainable: bool = False,
) -> Adapters:
    """Put an adapter that was read from `path` onto a model; arguments and errors as for `load`."""
    name = name or _name_of(Path(path))
    handle = handle_for(model)
    handle.check_can_add(name)
    model = handle.model
    _check_base(model, stored, Path(path), allow_other_base)
    for (
        notice
    ) in stored.notices:  # other dtype, a rank above the width, the decision for another base
        _LOG.warning("%s: %s", path, notice)
    return put_on(model, stored, name=name, trainable=trainable, origin=str(path))


def put_on(
    model: nn.Module,
    stored: StoredAdapter,
    *,
    name: str,
    trainable: bool,
    origin: str = "the adapter",
) -> Adapters:
    """Build a stored adapter's modules on the model's layers and let it act.

    Raises:
        AdapterFileError: A tensor finds no layer, or one of another shape.
    """
    handle = handle_for(model)
    handle.check_can_add(name)
    model = handle.model
    with handle.deactivated():
        modules = _build_modules(model, stored, origin)
        _check_trained(model, stored, origin)
        adapter = handle.add(name, stored.method, modules, list(stored.trained), stored.provenance)
        with torch.no_grad():
            for parameter_name, copy in adapter.trained_tensors().items():
                copy.copy_(stored.trained[parameter_name])
        for parameter in adapter.parameters():
            parameter.requires_grad_(trainable and parameter.is_floating_point())
    handle.activate(name)
    return handle


def from_peft(peft_model: Any) -> Adapters:
    """Take over a live PEFT model: its base gets its own modules back, its adapters become ours.

    Args:
        peft_model: A `peft.PeftModel` with one or more unmerged LoRA adapters. It is used up.

    Returns:
        The handle on the base model, ``handle.model``, the active adapters active.

    Raises:
        AdapterFileError: An adapter uses an option of PEFT's that lorakit does not have.
    """
    names = list(getattr(peft_model, "peft_config", {}))
    if not names:
        raise AdapterStateError(
            f"{type(peft_model).__name__} carries no PEFT adapter. Give the model that get_peft_model or "
            "PeftModel.from_pretrained returned."
        )
    if any(getattr(module, "merged_adapters", None) for module in peft_model.modules()):
        raise AdapterStateError(
            "The PEFT model has an adapter merged into its weights, which PEFT can only take out by subtracting. "
            "Call unmerge_adapter() first, or load the base and the adapter's folder anew."
        )
    active = list(peft_model.active_adapters)
    trains = {n for n, p in peft_model.named_parameters() if p.requires_grad}
    with tempfile.TemporaryDirectory() as folder:
        peft_model.save_pretrained(folder, selected_adapters=names)
        stored = {
            name: formats.read(Path(folder) if name == "default" else Path(folder, name))
            for name in names
        }
    _give_back_originals(peft_model)
    base = peft_model.unload()
    for parameter in base.parameters():  # PEFT froze them and does not say which were frozen before
        parameter.requires_grad_(parameter.is_floating_point())
    for name in names:
        put_on(base, stored[name], name=name, trainable=any(f".{name}." in n for n in trains))
    handle = handle_of(base)
    assert handle is not None
    handle.activate(active[0] if len(active) == 1 else {name: 1.0 for name in active})
    return handle


def _give_back_originals(peft_model: nn.Module) -> None:
    """Put back the modules that PEFT trains copies of (modules_to_save); its unload keeps the copy."""
    for path, wrapper in list(peft_model.named_modules()):
        original = getattr(wrapper, "original_module", None)
        if isinstance(original, nn.Module) and hasattr(wrapper, "modules_to_save"):
            parent, _, name = path.rpartition(".")
            setattr(peft_model.get_submodule(parent), name, original)


def _build_modules(
    model: nn.Module, stored: StoredAdapter, origin: str
) -> dict[str, AdapterModule]:
    known = dict(model.named_modules())
    missing = [path for path in stored.layers if path not in known]
    if missing:
        raise AdapterFileError(
            f"{origin} holds tensors for {len(missing)} layers that the model does not have, the first "
            f"'{missing[0]}'.{nearest(missing[0], known)} Load it on the model class it was trained with."
        )
    modules: dict[str, AdapterModule] = {
        path: _build_layer(model, path, layer, stored, origin)
        for path, layer in stored.layers.items()
    }
    modules.update(_build_other_modules(model, stored, origin))
    lora = lora_of(stored.method)
    if lora is not None and lora.tie_head:
        path, head = tied_head(model, modules)
        modules[path] = head
    return modules


def _build_other_modules(
    model: nn.Module, stored: StoredAdapter, origin: str
) -> dict[str, AdapterModule]:
    """The modules of methods other than LoRA: made by the method, then filled with the file's tensors."""
    modules: dict[str, AdapterModule] = {}
    devices = (parameter.device for parameter in model.parameters())
    with seeded(0, devices):  # the random start is overwritten, and is to leave no trace
        for part in parts(stored.method):
            if not isinstance(part, LoRA):
                modules.update(part.modules(model))
    for path in {**modules, **stored.modules}:
        expected = modules[path].state_dict() if path in modules else {}
        found = stored.modules.get(path, {})
        if expected.keys() != found.keys():
            raise AdapterFileError(
                f"{origin} holds {_listed(found)} for '{path}', and {type(stored.method).__name__} has "
                f"{_listed(expected)} there on this model. Load it on the model class it was trained with."
            )
        for name, tensor in found.items():
            if tensor.shape != expected[name].shape:
                raise AdapterFileError(
                    f"{origin}: '{name}' of '{path}' has shape {tuple(tensor.shape)}, and this model takes "
                    f"{tuple(expected[name].shape)}. Load it on the base it was made for."
                )
        there = {name: t.to(expected[name].device, copy=True) for name, t in found.items()}
        modules[path].load_state_dict(there, assign=True)  # in the file's dtype
    return modules


def _listed(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(tensors) or "no tensor"


def _build_layer(
    model: nn.Module, path: str, at_rest: StoredLayer, stored: StoredAdapter, origin: str
) -> LoRALayer:
    layer = model.get_submodule(path)
    kind = LoralibConvLoRA if at_rest.kind == LoralibConvLoRA.kind else kind_of(layer, model, path)
    if kind.kind != at_rest.kind:
        raise AdapterFileError(
            f"{origin} holds {at_rest.kind} factors for '{path}', which is a {type(layer).__name__} in this model."
        )
    options: dict[str, Any] = {}
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and kind is ConvLoRA:
        options["grouped"] = at_rest.A.shape[1] == layer.weight.shape[1]
    lora = lora_of(stored.method)
    dropout = lora.dropout if lora is not None else 0.0
    module = kind(
        layer,
        rank=at_rest.rank,
        scaling=at_rest.scaling,
        alpha=at_rest.alpha,
        dropout=0.0 if kind.shadows else dropout,
        slices=at_rest.slices,
        dora=at_rest.magnitude is not None,
        dtype=at_rest.A.dtype,
        **options,
    )
    tensors = {
        "lora_A": at_rest.A,
        "lora_B": at_rest.B,
        "magnitude": at_rest.magnitude,
        "initial_A": at_rest.initial_A,
        "initial_B": at_rest.initial_B,
    }
    for attribute, tensor in tensors.items():
        if tensor is None:
            continue
        place = getattr(module, attribute)
        expected = module.lora_A if attribute == "initial_A" else module.lora_B
        expected = expected if attribute.startswith("initial") else place
        if tensor.shape != expected.shape:
            raise AdapterFileError(
                f"{origin}: {attribute} of '{path}' has shape {tuple(tensor.shape)}, and this model's "
                f"{type(layer).__name__} takes {tuple(expected.shape)}. Load it on the base it was made for."
            )
        if attribute.startswith("initial"):
            setattr(module, attribute, tensor.to(module.lora_A.device, copy=True))
        else:
            with torch.no_grad():
                place.copy_(tensor)
    return module


def _check_trained(model: nn.Module, stored: StoredAdapter, origin: str) -> None:
    known = dict(model.named_parameters(remove_duplicate=False))
    known.update(base_parameters(model))
    for name, tensor in stored.trained.items():
        if name not in known:
            raise AdapterFileError(
                f"{origin} holds a trained '{name}', and the model has no such parameter."
                f"{nearest(name, known)} Load it on the model class it was trained with."
            )
        if known[name].shape != tensor.shape:
            raise AdapterFileError(
                f"{origin}: the trained '{name}' has shape {tuple(tensor.shape)}, and the model's has "
                f"{tuple(known[name].shape)}. For a classification head, load the base with the adapter's "
                f"number of labels: num_labels={tensor.shape[0]}."
            )


def _check_base(model: nn.Module, stored: StoredAdapter, path: Path, allow: bool) -> None:
    formats.check_targets(stored, path, model)
    if stored.base is None:
        return
    live = formats.base_record(model, exclude=tuple(stored.trained))
    try:
        stored.notices.extend(formats.compare(stored.base, live) or [])
    except WrongBaseError as error:
        if not allow:
            raise
        stored.notices.append(f"loaded on another base because allow_other_base is set: {error}")


def _name_of(path: Path) -> str:
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", path.resolve().stem).strip("_-")
    return stem or "adapter"
