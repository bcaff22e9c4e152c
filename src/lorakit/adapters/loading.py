"""Load an adapter from disk onto a model."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import nn

from lorakit.adapters import formats
from lorakit.adapters.attach import handle_for
from lorakit.adapters.formats.fingerprint import BaseRecord
from lorakit.adapters.formats.layout import parameters_by_name
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.adapters.formats.stored_layer import LAYER_ATTRIBUTES, StoredLayer
from lorakit.adapters.handle import Adapters
from lorakit.adapters.installed import base_parameters
from lorakit.adapters.names import ADAPTER_NAME, is_attribute
from lorakit.errors import AdapterFileError, WrongBaseError, nearest
from lorakit.file_names import ADAPTER
from lorakit.methods.combined import lora_of, parts
from lorakit.methods.lora import LoRA
from lorakit.methods.lora.experts import on_experts
from lorakit.methods.lora.kinds import kind_of, tied_head
from lorakit.methods.lora.layer import LoRALayer
from lorakit.methods.module import AdapterModule
from lorakit.models.dtype_choice import MERGED
from lorakit.models.layers import type_name
from lorakit.models.packed import require_gradients
from lorakit.models.tokenizer import tokenizer_digest
from lorakit.models.tree import layers_by_path
from lorakit.ops.autocast import wide_dtype
from lorakit.ops.seeding import seeded

_LOG = logging.getLogger(__name__)


@torch.inference_mode(False)  # the adapter's tensors outlive a caller's inference mode
def load(
    model: nn.Module,
    path: str | Path | StoredAdapter,
    *,
    name: str | None = None,
    allow_other_base: bool = False,
    alpha: float | None = None,
    trainable: bool = False,
    tokenizer: Any = None,
) -> Adapters:
    """Load an adapter from disk onto a model, validate it against the model and activate it.

    Args:
        model: The base the adapter was made for.
        path: A folder of lorakit or PEFT, a loralib file, or an adapter that has been read or computed.
        name: Its name on this model; None uses the folder's name, and for RUN/adapter the run's.
        allow_other_base: Load the adapter even if the file records another base, and log a warning.
        alpha: Alpha of a loralib file, which does not record it.
        trainable: Whether its tensors require a gradient, to continue training. Tensors of 16 bits that the method
            adds become float32, as in PEFT and as `attach` makes them: small updates would round to nothing. Copies of
            base tensors keep the base's dtype.
        tokenizer: The tokenizer that you use with the model. Another one than in training is a warning.

    Returns:
        The model's handle; a model that already has adapters keeps its handle.

    Raises:
        AdapterFileError: The file is damaged or unsafe, or its tensors do not fit the model's layers.
        WrongBaseError: It was trained on another base.
        AdapterStateError: The name is taken, or an adapter is merged.
    """
    stored = path.copy() if isinstance(path, StoredAdapter) else formats.read(path, alpha=alpha)
    name = name or default_name(stored.path)
    handle = handle_for(model)
    handle.check_can_add(name)
    digest = None if tokenizer is None else tokenizer_digest(tokenizer)
    check_base(handle.model, stored, allow_other_base=allow_other_base, tokenizer=digest)
    with handle.changing():
        modules = build_modules(handle.model, stored, trainable=trainable)
        handle.add(
            name,
            stored.method,
            modules,
            stored.trained,
            trainable=trainable,
            provenance=stored.provenance,
        )
        handle.activate(name)
    return handle


def default_name(path: str | Path) -> str:
    """Return the name of an adapter that the user does not name: its folder's, and for RUN/adapter the run's."""
    path = Path(path).resolve()
    word = path.stem if path.is_file() else path.name
    if word == ADAPTER and path.is_dir():
        word = path.parent.name
    return usable_name(word)


def usable_name(word: str) -> str:
    """Return a word as a name that an adapter can have; a word that is one stays."""
    if ADAPTER_NAME.fullmatch(word) is None:
        word = re.sub(r"[^A-Za-z0-9_-]+", "_", word).strip("_-") or "adapter"
    return f"{word}_adapter" if is_attribute(word) else word


def build_modules(
    model: nn.Module, stored: StoredAdapter, *, trainable: bool = False
) -> dict[str, AdapterModule]:
    """Return the adapter's modules with the file's tensors, by layer path; the model is not changed.

    Args:
        model: The base, without active adapters.
        stored: The adapter, checked by `check_base`.
        trainable: Whether the tensors require a gradient, in float32 or wider.

    Raises:
        AdapterFileError: A tensor has no matching layer, or another shape than the layer needs.
    """
    known = layers_by_path(model)
    missing = [path for path in stored.layers if path not in known]
    if missing:
        raise AdapterFileError(
            f"'{stored.path}' holds tensors for {len(missing)} layers that the model does not have, the first is "
            f"'{missing[0]}'.{nearest(missing[0], known)} Load it on the model class it was trained with."
        )
    _check_trained(model, stored)
    modules = on_experts(
        {
            path: _build_layer(model, path, known[path], layer, stored)
            for path, layer in stored.layers.items()
        }
    )
    modules.update(_build_other_modules(model, stored))
    lora = lora_of(stored.method)
    if lora is not None and lora.tie_head:
        path, head = tied_head(model, modules)
        modules[path] = head
    if trainable:
        trained = (name.rpartition(".")[0] for name in stored.trained)
        require_gradients(model, [*modules, *trained])
    for module in modules.values():
        for tensor in (*module.parameters(), *module.buffers()):
            if trainable and tensor.is_floating_point():
                tensor.data = tensor.data.to(wide_dtype(tensor))
        module.requires_grad_(trainable)
    return modules


def _build_other_modules(model: nn.Module, stored: StoredAdapter) -> dict[str, AdapterModule]:
    """Return the modules of methods other than LoRA: built by the method, then filled with the file's tensors."""
    others = [part for part in parts(stored.method) if not isinstance(part, LoRA)]
    modules: dict[str, AdapterModule] = {}
    if others:
        # The initial values are overwritten. The state of the global generator stays.
        with seeded(0, (parameter.device for _, parameter in base_parameters(model))):
            for part in others:
                modules.update(part.modules(model))
    for path in {**modules, **stored.modules}:
        module, tensors = modules.get(path), stored.modules.get(path, {})
        try:
            if module is None:
                raise RuntimeError("the method has none there")
            devices = {name: tensor.device for name, tensor in module.state_dict().items()}
            copies = {n: t.to(devices.get(n, t.device), copy=True) for n, t in tensors.items()}
            module.load_state_dict(copies, assign=True)  # in the file's dtype
        except RuntimeError as error:
            raise AdapterFileError(
                f"'{stored.path}' holds {', '.join(tensors) or 'no tensor'} for '{path}', which does not fit "
                f"{type(stored.method).__name__} on this model: {error}. Load it on the base it was trained on."
            ) from error
    return modules


def _build_layer(
    model: nn.Module,
    path: str,
    layer: nn.Module,
    stored_layer: StoredLayer,
    stored: StoredAdapter,
) -> LoRALayer:
    """Return the LoRA module of one layer with the file's tensors, in the file's dtype."""
    lora_class = kind_of(layer, model, path)
    if lora_class.form_class.kind != stored_layer.kind:
        raise AdapterFileError(
            f"'{stored.path}' holds {stored_layer.kind} factors for '{path}', which is a {type_name(layer)} in this "
            "model. Load it on the model class it was trained with."
        )
    lora = lora_of(stored.method)
    dropout = lora.dropout if lora is not None else 0.0
    module = lora_class(
        layer,
        rank=stored_layer.rank,
        scaling=stored_layer.scaling,
        alpha=stored_layer.alpha,
        dropout=0.0 if lora_class.shadows else dropout,  # a shadowed weight has no branch
        slices=stored_layer.slices,
        grouped=stored_layer.grouped,
        lora_bias=stored_layer.B_bias is not None,
        dora=stored_layer.magnitude is not None,
        dtype=stored_layer.A.dtype,
    )
    for field, attribute in LAYER_ATTRIBUTES.items():
        tensor = getattr(stored_layer, field)
        if tensor is None:
            continue
        # PiSSA's A0 and B0, which are not set yet, have the shapes of A and B.
        expected = getattr(module, attribute.replace("initial", "lora"))
        if tensor.shape != expected.shape:
            raise AdapterFileError(
                f"'{stored.path}': {attribute} of '{path}' has shape {tuple(tensor.shape)}, and this model's "
                f"{type_name(layer)} needs {tuple(expected.shape)}. Load it on the base it was trained on."
            )
        if attribute.startswith("initial"):
            setattr(module, attribute, tensor.to(expected.device, copy=True))
        else:
            with torch.no_grad():
                expected.copy_(tensor)
    return module


def _check_trained(model: nn.Module, stored: StoredAdapter) -> None:
    """Reject a parameter trained in full that the model lacks or has in another shape."""
    if not stored.trained:
        return
    known = parameters_by_name(model).parameters
    for name, tensor in stored.trained.items():
        if name not in known:
            raise AdapterFileError(
                f"'{stored.path}' holds a trained '{name}', and the model has no such parameter."
                f"{nearest(name, known)} Load it on the model class it was trained with."
            )
        if known[name].shape != tensor.shape:
            raise AdapterFileError(
                f"'{stored.path}': the trained '{name}' has shape {tuple(tensor.shape)}, and the model's has "
                f"{tuple(known[name].shape)}. For an embedding whose vocabulary grew, resize the model first: "
                f"model.resize_token_embeddings({len(tensor)}). For a classification head, load the base with the "
                f"adapter's number of labels: num_labels={len(tensor)}."
            )


def check_base(
    model: nn.Module,
    stored: StoredAdapter,
    *,
    allow_other_base: bool,
    tokenizer: str | None,
    record: BaseRecord | None = None,
) -> None:
    """Validate and complete `stored` against the model, compare the base that it records, and log its notices.

    `tokenizer` is the digest of the tokenizer that is used with the model (`tokenizer_digest`), if it is known. A
    caller that knows that the base has not changed gives its fingerprint as `record`.

    Raises:
        AdapterFileError: The options and tensors of the file do not fit the model.
        WrongBaseError: It is another base, and `allow_other_base` is False; if True, a warning is logged.
    """
    formats.check_targets(stored, model)
    if stored.base is not None:
        if record is None or stored.trained:
            record = formats.base_record(model, exclude=tuple(stored.trained), for_comparison=True)
        try:
            stored.notices += formats.compare(stored.base, replace(record, tokenizer=tokenizer))
        except WrongBaseError as error:
            if not allow_other_base:
                if getattr(getattr(model, "config", None), MERGED, False):
                    raise WrongBaseError(
                        f"{error} This base is a merged model of lorakit, which has its adapter in it already: use it "
                        "without an adapter (--adapter null)."
                    ) from None
                raise
            stored.notices.append(
                f"loaded on another base because allow_other_base is set: {error}"
            )
    elif (note := _other_name(model, stored)) is not None:
        stored.notices.append(note)
    # For example: the base has another dtype, a rank exceeds a layer's width, allow_other_base accepted another base.
    for notice in stored.notices:
        _LOG.warning("%s: %s", stored.path, notice)


def _other_name(model: nn.Module, stored: StoredAdapter) -> str | None:
    """Return a notice if a folder of PEFT names another base than this model; it records nothing else of its base."""
    recorded = stored.base_name
    here = getattr(getattr(model, "config", None), "_name_or_path", None)
    # A local copy has the name of the hub id's last part.
    names = [PurePath(str(name)).name.lower() for name in (recorded, here) if name]
    if len(names) < 2 or names[0] == names[1]:
        return None
    return (
        f"It was trained on '{recorded}', and this model is '{here}'. The file records no more of its base, so only "
        "shapes are compared: make sure that the weights are the same."
    )
