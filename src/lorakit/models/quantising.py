"""Quantise the projections of a base model to 4 or 8 bits."""

from __future__ import annotations

import itertools
import logging
import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit.errors import BaseModelError, ConfigurationError, nearest
from lorakit.models.direct_reads import never_calls
from lorakit.models.dtypes import QUANTISATIONS, Quantisation, dtype_name
from lorakit.models.heads import classification_head, output_embeddings
from lorakit.models.layers import is_stacked_experts
from lorakit.models.packed import packed_layers
from lorakit.models.quantised import FLAGS, quantised_weights
from lorakit.models.tree import is_inside

_OLDEST = "0.50"
"""The oldest tested version of bitsandbytes."""
_PATCHED = threading.Lock()
"""Held while a method of transformers is replaced, so that two threads do not restore each other's replacement."""


@contextmanager
def projections_as_stored() -> Iterator[dict[str, torch.dtype]]:
    """Let `from_pretrained` keep the weights that `quantise` replaces in the dtype of their file.

    They then map the file. Cast while they are loaded, all of them would be in memory at once: a base of 16 bits that
    computes in float32 would need twice the size of its file.

    Yields:
        Paths of the layers with these weights, and the dtypes to cast them to, once the model is loaded. Empty if the
        architecture keeps some of its weights in float32.
    """
    from transformers import PreTrainedModel

    dtypes: dict[str, torch.dtype] = {}
    plan_of, thread = getattr(PreTrainedModel, "_get_dtype_plan", None), threading.get_ident()
    if plan_of is None:  # a part of transformers that may change: all weights are then cast at once
        yield dtypes
        return

    def plan(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype | None]:
        """Return regular expressions of names, and the dtype of the weights that they match; None does not cast."""
        planned = plan_of(model, dtype)
        if planned or threading.get_ident() != thread:
            return planned
        dtypes.clear()  # of a model inside this one
        for path in (path for paths in projection_paths(model) for path in paths):
            dtypes[path] = model.get_submodule(path).weight.dtype  # type: ignore[assignment]
        names = "|".join(re.escape(f"{path}.weight") for path in dtypes)
        return {f"^(?:{names})$": None} if dtypes else {}

    with _PATCHED:
        setattr(PreTrainedModel, "_get_dtype_plan", plan)  # noqa: B010 - another signature
        try:
            yield dtypes
        finally:
            PreTrainedModel._get_dtype_plan = plan_of


@torch.no_grad()
def quantise(
    model: nn.Module, kind: Quantisation, dtypes: Mapping[str, torch.dtype] | None = None
) -> int:
    """Quantise a model's projections in place to 4 or 8 bits, one layer at a time; return their number.

    The projections are the linear layers (GPT-2's `Conv1D` included) in the model's numbered blocks.
    Embeddings, norms, biases, heads, experts in stacked tensors and layers outside the blocks do not change.

    Args:
        model: A model with unquantised weights and no adapters. Its compute dtype does not change.
        kind: nf4 or int8.
        dtypes: Dtypes to cast the weights of some layers to before they are quantised, by the layer's path. A quantised
            layer computes in the dtype of its original weight.

    Raises:
        ConfigurationError: `kind` is not known, or bitsandbytes is not installed.
        BaseModelError: The model has no projection to quantise, or is quantised already.
    """
    layer_class = _layer_class(kind)
    if any(True for _ in itertools.chain(quantised_weights(model), packed_layers(model))):
        raise BaseModelError(
            f"The weights of this {type(model).__name__} are quantised in its checkpoint already. Leave the dtype "
            "at auto to use them unchanged."
        )
    projections = projection_paths(model)
    if not projections:
        raise BaseModelError(
            f"{type(model).__name__} has no linear layer in numbered blocks, so {kind} has nothing to quantise. "
            "Set the dtype to auto, bfloat16 or float32."
        )
    for first, *others in projections:
        original: Any = model.get_submodule(first)
        if dtypes and first in dtypes:
            original.weight.data = original.weight.data.to(dtypes[first])
        layer = layer_class(original)
        for path in (first, *others):
            model.set_submodule(path, layer)
    _mark(model, kind)
    return len(projections)


def quantise_base(
    model: nn.Module,
    kind: Quantisation,
    dtypes: Mapping[str, torch.dtype] | None,
    dtype: torch.dtype,
) -> list[str]:
    """Quantise a model that `from_pretrained` has loaded with `dtype`; return notices. `dtypes` and errors: `quantise`.

    The weights that stay as they are no longer map the checkpoint's file.
    """
    experts = _share_of_experts(model)
    count = quantise(model, kind, dtypes)
    # Of a file that is still mapped, all that was read would stay in memory.
    for tensor in (*model.parameters(), *model.buffers()):
        if type(tensor) in (Tensor, nn.Parameter):
            tensor.data = tensor.data.clone()
    notices = [
        f"The weights of {count} projections are quantised to {kind} (by bitsandbytes), all others are in "
        f"{dtype_name(dtype)}."
    ]
    if experts:
        notices.append(
            f"The experts of this model, {experts:.0%} of its weights, are not quantised, because they are stacked "
            "tensors and not layers. They need as much memory as before."
        )
    return notices


def _share_of_experts(model: nn.Module) -> float:
    """Return which share of a model's weights are experts in stacked tensors, which `quantise` does not change."""
    experts = {
        id(p): p.numel()
        for path, module in model.named_modules()
        if is_stacked_experts(path, module)
        for p in module.parameters(recurse=False)
    }
    return sum(experts.values()) / max(1, sum(p.numel() for p in model.parameters()))


def check_available(kind: str) -> None:
    """Reject an unknown kind of quantisation, or a missing or outdated bitsandbytes.

    Raises:
        ConfigurationError: `kind` is not known, or bitsandbytes is not installed.
    """
    from transformers.utils.import_utils import is_bitsandbytes_available

    if kind not in QUANTISATIONS:
        raise ConfigurationError(
            f"'{kind}' is not a kind of quantisation; choose one of {', '.join(QUANTISATIONS)}."
            f"{nearest(str(kind), QUANTISATIONS)}"
        )
    if not is_bitsandbytes_available(_OLDEST):
        raise ConfigurationError(
            f"To quantise a base to {kind}, lorakit needs bitsandbytes {_OLDEST} or newer, which is not installed. "
            'Install it with: pip install "lorakit[quantised]"'
        )


def _layer_class(kind: str) -> Any:
    check_available(kind)
    # On some processors the import logs a kernel to download from the hub. Our layers do not use it,
    # since it has no gradient.
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        from lorakit.models.quantised_layers import Int8Linear, NF4Linear
    finally:
        log.setLevel(level)
    return {"nf4": NF4Linear, "int8": Int8Linear}[kind]


def projection_paths(model: nn.Module) -> list[list[str]]:
    """Return the paths of each layer that `quantise` replaces; a shared layer has several."""
    heads = classification_head(model)
    excluded = {
        *(getattr(model, "_keep_in_fp32_modules", None) or ()),
        *(getattr(model, "_keep_in_fp32_modules_strict", None) or ()),
        # T5 and related models cast the input of `wo` to its weight's dtype, which would be an integer.
        "wo",
    }
    found: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if type(module) not in (nn.Linear, Conv1D) or module is output_embeddings(model):
            continue
        parts = path.split(".")
        in_block = any(part.isdecimal() for part in parts[:-1])
        if not in_block or excluded & set(parts) or is_inside(path, *heads):
            continue
        # torch's own blocks read the weights of their linear layers in a fast path, without calling them.
        owner = model.get_submodule(".".join(parts[:-1]))
        reads = isinstance(owner, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer))
        if reads or never_calls(owner, parts[-1]):
            continue
        found.setdefault(id(module), []).append(path)
    holders = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    return [
        paths for paths in found.values() if holders[id(model.get_submodule(paths[0]).weight)] == 1
    ]


def _mark(model: nn.Module, kind: str) -> None:
    """Mark the model as quantised: PEFT reads the flag, `save_pretrained` the configuration."""
    from transformers import BitsAndBytesConfig, PretrainedConfig

    setattr(model, FLAGS[kind], True)
    config = getattr(model, "config", None)
    if not isinstance(config, PretrainedConfig):
        return
    unquantised = [n for n, m in model.named_modules() if type(m) in (nn.Linear, Conv1D)]
    options: dict[str, Any] = {"load_in_8bit": True, "llm_int8_threshold": 0.0}
    if kind == "nf4":
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        options["bnb_4bit_compute_dtype"] = config.dtype
    config.quantization_config = BitsAndBytesConfig(**options, llm_int8_skip_modules=unquantised)
