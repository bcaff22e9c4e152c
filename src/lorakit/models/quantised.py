"""Read quantised weights, and replace them by dequantised ones.

A quantised weight represents a matrix ``W_q`` close to the original ``W``. It is never trained and never
quantised again: an adapter is trained on top of it, and a merged weight, ``W_q`` plus the adapter's
delta, is an ordinary tensor. bitsandbytes packs and unpacks. Models that `transformers` quantised with
bitsandbytes work too.
"""

from __future__ import annotations

import copy
import hashlib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit.errors import AdapterStateError
from lorakit.models.digests import Digests, digest
from lorakit.models.tree import base_modules

KINDS = frozenset({"nf4", "fp4", "int8"})
"""Supported kinds of quantisation; fp4 only in models that other tools quantised."""

FLAGS = {"nf4": "is_loaded_in_4bit", "int8": "is_loaded_in_8bit"}
"""The flag that `transformers` sets on a model and PEFT checks, for each kind."""

_REPACKS = "support_avx512bf16_for_cpu"
"""The flag of bitsandbytes' 4-bit layers that lets them repack their weight."""

Cleared = tuple[nn.Module, str, Any]
"""A module, a flag of it that was cleared, and its former value."""


# --- reading ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class QuantisedWeight:
    """A quantised weight of a linear layer, and the matrix it represents."""

    layer: nn.Module
    packed: nn.Parameter

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        state = getattr(self.packed, "quant_state", None)
        return "int8" if state is None else state.quant_type

    @property
    def shape(self) -> torch.Size:
        """Shape of the unquantised weight in its own layout: (in, out) for a `Conv1D`."""
        shape = torch.Size((self.layer.out_features, self.layer.in_features))  # type: ignore[arg-type]
        return torch.Size(reversed(shape)) if self.stored_transposed else shape

    def numel(self) -> int:
        """Number of elements of the unquantised weight; the packed tensor can have half as many."""
        return self.shape.numel()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the unquantised weight, and of a merged one.

        Raises:
            AdapterStateError: An int8 layer of another library does not record it.
        """
        state = getattr(self.packed, "quant_state", None)
        made_from = getattr(self.layer, "made_from", None)
        dtype = state.dtype if state is not None else made_from and made_from.dtype
        if dtype is None:
            raise AdapterStateError(
                "This int8 layer does not record the dtype of its original weight, which a merged weight needs. "
                "Load the base with lorakit.models.loading.load_base(name, dtype='int8'), or unquantised. To train in "
                'Trainer on this base, set save_strategy="no" and call adapters.save(folder).'
            )
        return dtype

    def matrix(self) -> Tensor:
        """Return ``W_q``, (out, in), in float32: every packed number times its scale."""
        from bitsandbytes import functional

        state = getattr(self.packed, "quant_state", None)
        if state is None:
            return functional.int8_vectorwise_dequant(self.packed.data, self._row_scales)
        return expanded_4bit(self.packed.data, state, torch.float32)

    def dequantised(self) -> Tensor:
        """Return ``W_q`` in the dtype and layout of the original weight."""
        return self.in_layout(self.matrix().to(self.dtype))

    def in_layout(self, matrix: Tensor) -> Tensor:
        """Return an (out, in) matrix in the layout of the original weight."""
        return matrix.T.contiguous() if self.stored_transposed else matrix

    def digests(self) -> Digests:
        """Return the digests of the packed numbers with their scales, and of the original in bfloat16."""
        exact = hashlib.sha256(f"{self.kind}{tuple(self.shape)}\0".encode())
        for name, part in sorted({"packed": self.packed.data, **self.scales}.items()):
            exact.update(name.encode() + digest(part, part.dtype))
        made_from = getattr(self.layer, "made_from", None)
        return Digests(exact.digest(), made_from and made_from.bfloat16)

    @property
    def scales(self) -> dict[str, Tensor]:
        """The tensors by which the packed numbers are multiplied, by name."""
        state = getattr(self.packed, "quant_state", None)
        return {"scales": self._row_scales} if state is None else state.as_dict(packed=True)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that hold the packed numbers and the scales: the same objects in each call."""
        state = getattr(self.packed, "quant_state", None)
        if state is None:
            return [self.packed, self._row_scales]
        tensors = [self.packed, state.absmax, state.code]
        if state.nested:  # the scales are quantised too
            tensors += [state.offset, state.state2.absmax, state.state2.code]
        return tensors

    @property
    def _row_scales(self) -> Tensor:
        # The layers of bitsandbytes move them from the weight to their state in the first forward pass.
        scales = getattr(self.packed, "SCB", None)
        return self.layer.state.SCB if scales is None else scales  # type: ignore[union-attr, return-value]

    @property
    def stored_transposed(self) -> bool:
        """Whether the original weight is that of a `Conv1D`, (in, out)."""
        made_from = getattr(self.layer, "made_from", None)
        # transformers records the original class in `source_cls`.
        source = (
            made_from.layer_class if made_from else getattr(self.layer, "source_cls", nn.Linear)
        )
        return issubclass(source, Conv1D)


def expanded_4bit(packed: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    """Return ``W_q``, (out, in), in `dtype`, from 4-bit numbers and bitsandbytes' `QuantState`."""
    from bitsandbytes import functional

    # As one row: bitsandbytes' CPU kernel (0.50) starts a new block of 64 in each row. If the width is not a
    # multiple of 64, it applies the scales of the wrong blocks.
    flat = copy.copy(state)
    flat.shape, flat.dtype = torch.Size((1, state.shape.numel())), dtype
    return functional.dequantize_4bit(packed, flat).view(state.shape)


def quantised_weight(
    layer: nn.Module, parameter: nn.Parameter | None = None
) -> QuantisedWeight | None:
    """Return the layer's weight, or `parameter` while another replaces it, if it is quantised; else None."""
    bnb = _loaded_library()
    if bnb is None or not isinstance(layer, nn.Linear):
        return None
    packed: Any = getattr(layer, "weight", None) if parameter is None else parameter
    four_bits = isinstance(packed, bnb.nn.Params4bit) and packed.quant_state is not None
    eight_bits = isinstance(packed, bnb.nn.Int8Params) and packed.dtype == torch.int8
    return QuantisedWeight(layer, packed) if four_bits or eight_bits else None


def quantised_weights(model: nn.Module) -> Iterator[tuple[str, QuantisedWeight]]:
    """Yield the path and weight of every layer that is quantised now."""
    for path, module in base_modules(model):
        weight = quantised_weight(module)
        if weight is not None:
            yield path, weight


def _loaded_library() -> Any:
    # If nothing has imported it, no layer can be quantised by it.
    return sys.modules.get("bitsandbytes")


# --- dequantising ----------------------------------------------------------------------------------


def dequantise_model(model: nn.Module) -> int:
    """Dequantise every quantised layer, so that its weight becomes ``W_q``; return the number of layers."""
    weights = [weight for _, weight in quantised_weights(model)]
    for weight in weights:
        dequantise_layer(weight, weight.matrix())
    for owner, name in _marks(model):
        delattr(owner, name)
    return len(weights)


def dequantise_layer(weight: QuantisedWeight, matrix: Tensor) -> None:
    """Dequantise a layer permanently, with an (out, in) `matrix` as its weight."""
    layer: Any = weight.layer
    dequantised = weight.in_layout(matrix.to(weight.dtype))
    layer.__class__ = nn.Linear
    if weight.stored_transposed:
        layer.__class__, layer.nx, layer.nf = Conv1D, layer.in_features, layer.out_features
        del layer.in_features, layer.out_features
    layer._parameters["weight"] = nn.Parameter(dequantised, requires_grad=False)
    for name in layer.__dict__.keys() & _OF_QUANTISED_LAYERS:
        delattr(layer, name)  # `state` can hold the packed numbers


_OF_QUANTISED_LAYERS = {
    *("made_from", "source_cls", "state", "index"),
    *("compute_dtype", "compute_type_is_set", "quant_state", "quant_storage"),
    _REPACKS,
}
"""Attributes of quantised layers that `nn.Linear` lacks."""


@contextmanager
def unmarked(model: nn.Module) -> Iterator[None]:
    """Hide quantisation metadata of a model while its dequantised weights are saved."""
    marks = [(owner, name, getattr(owner, name)) for owner, name in _marks(model)]
    for owner, name, _ in marks:
        delattr(owner, name)
    try:
        yield
    finally:
        for owner, name, value in marks:
            setattr(owner, name, value)


def _marks(model: nn.Module) -> list[tuple[Any, str]]:
    """Return the owner and name of each attribute that marks a model as quantised."""
    of_model = (*FLAGS.values(), "is_quantized", "hf_quantizer", "quantization_method")
    marks: list[tuple[Any, str]] = [(model, name) for name in of_model]
    marks.append((getattr(model, "config", None), "quantization_config"))
    return [(owner, name) for owner, name in marks if owner is not None and name in vars(owner)]


def prevent_repacking(model: nn.Module) -> list[Cleared]:
    """Stop bitsandbytes' own 4-bit layers from repacking their weights, so that they stay differentiable.

    In evaluation on some CPUs they repack a weight, which rounds its scales and blocks gradients.

    Returns:
        What `restore_flags` sets again.
    """
    return _clear((layer, _REPACKS) for _, layer in base_modules(model))


def allow_training(model: nn.Module) -> list[Cleared]:
    """Prevent repacking, and let transformers' Trainer accept a quantised model.

    The Trainer rejects a model with `is_quantized` unless PEFT has put the adapters on it.

    Returns:
        What `restore_flags` sets again.
    """
    flags = ((part, "is_quantized") for _, part in base_modules(model))
    return prevent_repacking(model) + _clear(flags)


def _clear(flags: Iterable[tuple[nn.Module, str]]) -> list[Cleared]:
    cleared = [
        (module, name, vars(module)[name]) for module, name in flags if vars(module).get(name)
    ]
    for module, name, _ in cleared:
        setattr(module, name, False)
    return cleared


def restore_flags(cleared: Iterable[Cleared]) -> None:
    """Set the flags again, except those of models and layers that have been dequantised since."""
    for module, name, value in cleared:
        if name in vars(module):
            setattr(module, name, value)


def require_exact_layers(model: nn.Module) -> None:
    """Check that gradients pass through bitsandbytes' own 4-bit layers, and that they compute with ``W_q``.

    Raises:
        AdapterStateError: A layer is repacked already, or applies the scales of the wrong blocks.
    """
    bnb = _loaded_library()
    if bnb is None:
        return
    modules: Any = base_modules(model)
    for path, layer in modules:
        if not isinstance(layer, bnb.nn.Linear4bit) or not layer.weight.bnb_quantized:
            continue
        state = layer.weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):
            raise AdapterStateError(
                f"bitsandbytes has repacked the weight of '{path}' in an evaluation on the CPU, so no gradient "
                "passes through it. Load the base again and attach the adapter before running the model, or load "
                "it with lorakit.models.loading.load_base(name, dtype='nf4'), which prevents repacking."
            )
        own_product = type(layer).__module__.startswith("bitsandbytes.")
        if own_product and layer.in_features % state.blocksize:
            computed = bnb.functional.dequantize_4bit(layer.weight.data, state)
            if not computed.equal(expanded_4bit(layer.weight.data, state, state.dtype)):
                raise AdapterStateError(
                    f"'{path}' has {layer.in_features} inputs, not a multiple of {state.blocksize}, and this "
                    "bitsandbytes applies the scales of other blocks to it. Load the unquantised weights with "
                    "lorakit.models.loading.load_base(name, dtype='nf4'), whose layers are correct."
                )
