"""Convert a live adapter to its stored form, and write it to a folder."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit import storage
from lorakit.adapters import formats
from lorakit.adapters.formats.layout import base_layout
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.adapters.formats.stored_layer import LAYER_ATTRIBUTES, StoredLayer
from lorakit.adapters.installed import InstalledAdapter, base_parameters
from lorakit.adapters.layer_adapters import LayerAdapters
from lorakit.errors import AdapterStateError
from lorakit.file_names import PEFT_CONFIG
from lorakit.formatting import listed
from lorakit.methods.lora.embedding import TiedHeadLoRA
from lorakit.methods.lora.experts import ExpertsLoRA, lora_layers
from lorakit.methods.lora.layer import LoRALayer
from lorakit.methods.module import AdapterModule
from lorakit.models.parameter_swaps import hidden_parameters
from lorakit.models.sharding import full_shape, full_tensor
from lorakit.models.tree import submodule

_LOG = logging.getLogger(__name__)

_Copy = Callable[[Tensor], Tensor]


def _cpu_copy(tensor: Tensor, *, keep: bool = True) -> Tensor:
    """Return a detached, contiguous copy on the CPU; gather a tensor that is sharded over processes.

    A process that does not write the adapter does not `keep` the numbers, and gathers them for the one that does.
    """
    with full_tensor(tensor) as full:
        if full.is_meta:
            raise AdapterStateError(
                "The adapter's tensors are on the meta device, without numbers to save. Attach or load the adapter on "
                "a base that has its weights."
            )
        return full.detach().to("cpu", copy=True).contiguous() if keep else _without_data(full)


def _without_data(tensor: Tensor) -> Tensor:
    """Return a tensor of the same shape and dtype on the meta device."""
    return torch.empty(full_shape(tensor), dtype=tensor.dtype, device="meta")


def store(
    model: nn.Module,
    adapter: InstalledAdapter,
    base: formats.BaseRecord | None,
    copy: _Copy = _cpu_copy,
) -> StoredAdapter:
    """Return the stored form of a live adapter, with a `copy` of each tensor: on the CPU, by default."""
    lora = lora_layers(adapter.modules)
    heads = {m.source[0]: path for path, m in lora.items() if isinstance(m, TiedHeadLoRA)}
    layers = {
        path: _store_layer(submodule(model, path), module, copy, heads.get(module))
        for path, module in lora.items()
        if not isinstance(module, TiedHeadLoRA)
    }
    modules = {path: _added_tensors(module, copy) for path, module in adapter.modules.items()}
    return StoredAdapter(
        method=adapter.method,
        layers=layers,
        modules={path: tensors for path, tensors in modules.items() if tensors},
        trained={name: copy(tensor) for name, tensor in adapter.trained_tensors().items()},
        base=base,
        layout=base_layout(model),
        provenance=dict(adapter.provenance),
    )


def file_bytes(model: nn.Module, adapter: InstalledAdapter) -> int:
    """Return the size of the tensors that `save` writes, without computing or copying any."""
    stored = store(model, adapter, None, _without_data)
    return sum(tensor.nbytes for tensor in formats.tensors_of(stored))


def save(
    model: nn.Module,
    adapter: InstalledAdapter,
    folder: Path,
    base: formats.BaseRecord,
    *,
    tokenizer: Any,
    overwrite: bool,
    is_main_process: bool,
) -> Path:
    """Write an adapter folder atomically (see `Adapters.save`)."""
    stored = store(model, adapter, base, partial(_cpu_copy, keep=is_main_process))
    if not is_main_process:
        return folder
    if unfrozen := [f"'{name}'" for name, p in base_parameters(model) if p.requires_grad]:
        _LOG.warning(
            "%s: parameters of the base require a gradient (%s), and the file does not hold what training changed in "
            "them. Let the adapter train copies, which it holds: LoRA(train_modules=...). Or save the whole model: "
            "model.save_pretrained(folder).",
            folder,
            listed(unfrozen, 2),
        )
    if overwrite:
        formats.check_replaceable(folder)
    with storage.atomic_folder(folder, overwrite=overwrite) as temporary:
        if tokenizer is not None:
            for notice in formats.save_tokenizer(tokenizer, temporary):
                _LOG.warning("%s: %s", folder, notice)
        notices = formats.write(stored, temporary)
        if (temporary / PEFT_CONFIG).exists():
            for notice in notices:  # on what PEFT computes
                _LOG.warning("%s: %s", folder, notice)
    return folder


def _store_layer(
    layer: nn.Module, module: LoRALayer, copy: _Copy, tied_head: str | None
) -> StoredLayer:
    """Return the stored form of the adapter on one layer, which may act on a tied head too."""
    form = module.form
    live = {field: getattr(module, name) for field, name in LAYER_ATTRIBUTES.items()}
    tensors: dict[str, Any] = {field: copy(t) for field, t in live.items() if t is not None}
    return StoredLayer(
        **tensors,
        kind=form.kind,
        scaling=module.scaling,
        alpha=module.alpha,
        slices=form.slices,
        grouped=form.grouped,
        transposed=form.transposed,
        base_norms=_base_norms(layer, module, copy),
        tied_head=tied_head,
    )


def _base_norms(layer: nn.Module, module: LoRALayer, copy: _Copy) -> Tensor | None:
    """Return the norms of all rows for DoRA on slices: PEFT has a magnitude for each row, adapted or not."""
    if module.magnitude is None or not module.slices:
        return None
    if copy is _without_data:
        rows = module.form.out_features(module.lora_B)
        return torch.empty(rows, dtype=module.magnitude.dtype, device="meta")
    adapters = layer.adapters
    assert isinstance(adapters, LayerAdapters)
    with hidden_parameters(layer, adapters.replaced):
        return copy(module.row_norms(layer))


def _added_tensors(module: AdapterModule, copy: _Copy) -> dict[str, Tensor]:
    """Return the tensors that a method adds to a layer, without trained copies; none for LoRA (`_store_layer`)."""
    if isinstance(module, LoRALayer | ExpertsLoRA):
        return {}
    state = module.state_dict()
    return {name: copy(t) for name, t in state.items() if not name.startswith("trained.")}
