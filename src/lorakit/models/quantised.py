"""What quantised weights stand for, and how a layer goes on without them.

A quantised weight stands for a matrix ``W_q`` near the source's ``W``. It is never trained and never
rounded anew: an adapter is trained beside it, and a merged weight, ``W_q`` plus the adapter's delta, is
an ordinary one. bitsandbytes packs and unpacks; a model that it quantised by way of `transformers` is
understood as well.
"""

from __future__ import annotations

import copy
import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit.errors import AdapterStateError
from lorakit.models.digests import Digests, digests

KINDS = frozenset({"nf4", "fp4", "int8"})
"""Kinds of quantisation that are understood; fp4 in models that were quantised elsewhere."""

FLAGS = {"nf4": "is_loaded_in_4bit", "int8": "is_loaded_in_8bit"}
"""What `transformers` sets on a model, and PEFT asks for."""


# --- reading them ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class QuantisedWeight:
    """A quantised weight of a linear layer, and what it stands for."""

    layer: nn.Module
    packed: nn.Parameter

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        state = getattr(self.packed, "quant_state", None)
        return "int8" if state is None else state.quant_type

    @property
    def shape(self) -> torch.Size:
        """The whole weight's shape, in its own layout: (in, out) for a `Conv1D`."""
        shape = torch.Size((self.layer.out_features, self.layer.in_features))  # type: ignore[arg-type]
        return torch.Size(reversed(shape)) if self.stored_transposed else shape

    def numel(self) -> int:
        """How many numbers the whole weight has; packed ones can be half as many."""
        return self.shape.numel()

    @property
    def dtype(self) -> torch.dtype:
        """In which the whole weight was, and a merged one will be.

        Raises:
            AdapterStateError: An int8 layer of another library's does not say it.
        """
        state = getattr(self.packed, "quant_state", None)
        made_from = getattr(self.layer, "made_from", None)
        dtype = state.dtype if state is not None else made_from and made_from.dtype
        if dtype is None:
            raise AdapterStateError(
                "This int8 layer does not say in which dtype its weight was, and so not what a merged one should be. "
                "Load the base by lorakit.models.loading.load_base(name, dtype='int8'), or unquantised."
            )
        return dtype

    def matrix(self) -> Tensor:
        """``W_q``, (out, in), in float32: every packed number times its scale."""
        from bitsandbytes import functional

        state = getattr(self.packed, "quant_state", None)
        if state is None:
            return functional.int8_vectorwise_dequant(self.packed.data, self._row_scales)
        return expanded_4bit(self.packed.data, state, torch.float32)

    def whole(self) -> Tensor:
        """``W_q`` rounded to the dtype and in the layout of the weight it was made from."""
        return self.in_layout(self.matrix().to(self.dtype))

    def in_layout(self, matrix: Tensor) -> Tensor:
        """An (out, in) matrix in the layout of the weight that this one was made from."""
        return matrix.T.contiguous() if self.stored_transposed else matrix

    def digests(self) -> Digests:
        """Of the packed numbers with their scales, and of the whole weight rounded to bfloat16."""
        state = getattr(self.packed, "quant_state", None)
        parts = {"scales": self._row_scales} if state is None else state.as_dict(packed=True)
        exact = hashlib.sha256(f"{self.kind}{tuple(self.shape)}\0".encode())
        for name, part in sorted({"packed": self.packed.data, **parts}.items()):
            exact.update(name.encode() + digests(part).exact)
        made_from = getattr(self.layer, "made_from", None)
        return Digests(exact.digest(), made_from and made_from.bfloat16)

    @property
    def _row_scales(self) -> Tensor:
        # bitsandbytes' own layer moves them from the weight to its state in its first forward pass.
        scales = getattr(self.packed, "SCB", None)
        return self.layer.state.SCB if scales is None else scales  # type: ignore[union-attr, return-value]

    @property
    def stored_transposed(self) -> bool:
        """Whether the whole weight is a `Conv1D`'s, (in, out)."""
        made_from = getattr(self.layer, "made_from", None)
        # transformers leaves a note of its own.
        source = (
            made_from.layer_class if made_from else getattr(self.layer, "source_cls", nn.Linear)
        )
        return issubclass(source, Conv1D)


def expanded_4bit(packed: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    """``W_q``, (out, in), in `dtype`, of 4-bit numbers and bitsandbytes' `QuantState`."""
    from bitsandbytes import functional

    # As one row: bitsandbytes' CPU kernel (0.50) counts the blocks of 64 by rows, and where the width is no
    # multiple of 64 it takes the scales of other blocks.
    flat = copy.copy(state)
    flat.shape, flat.dtype = torch.Size((1, state.shape.numel())), dtype
    return functional.dequantize_4bit(packed, flat).view(state.shape)


def quantised_weight(
    layer: nn.Module, parameter: nn.Parameter | None = None
) -> QuantisedWeight | None:
    """The layer's weight (or the one that stands aside, while another is in its place), if it is quantised."""
    packed: Any = layer._parameters.get("weight") if parameter is None else parameter
    bnb = _loaded_library()
    if bnb is None or not isinstance(layer, nn.Linear):
        return None
    four_bits = isinstance(packed, bnb.nn.Params4bit) and packed.quant_state is not None
    eight_bits = isinstance(packed, bnb.nn.Int8Params) and packed.dtype == torch.int8
    return QuantisedWeight(layer, packed) if four_bits or eight_bits else None


def quantised_weights(model: nn.Module) -> Iterator[tuple[str, QuantisedWeight]]:
    """Path and weight of every layer that is quantised now."""
    for path, module in model.named_modules():
        weight = quantised_weight(module)
        if weight is not None:
            yield path, weight


def _loaded_library() -> ModuleType | None:
    # Where nothing has imported it, no layer is its.
    return sys.modules.get("bitsandbytes")


# --- leaving them ----------------------------------------------------------------------------------


def compute_whole(layer: nn.Module) -> type[nn.Module]:
    """Let a quantised layer compute as `nn.Linear`, which it derives from, for a plain weight to act in it.

    Returns:
        The layer's class, for `compute_quantised`.

    Raises:
        AdapterStateError: Something has wrapped the layer's `forward`, and would go on calling it.
    """
    if "forward" in layer.__dict__:
        raise AdapterStateError(
            "A quantised layer's forward has been wrapped (by accelerate, where a model is spread over devices or "
            "offloaded), so that a merged weight could not act in it. Load the base on one device, or unquantised."
        )
    quantised_class = type(layer)
    layer.__class__ = nn.Linear
    return quantised_class


def compute_quantised(
    layer: nn.Module, packed: nn.Parameter, quantised_class: type[nn.Module]
) -> None:
    """Undo `compute_whole`: the packed weight is in its place again, bit for bit, where the layer is now."""
    device = layer._parameters["weight"].device  # type: ignore[union-attr]
    layer._parameters["weight"] = packed
    layer.__class__ = quantised_class
    if packed.device != device:
        layer.to(device)


def make_whole(model: nn.Module) -> int:
    """Turn every layer that is still quantised into an ordinary one with ``W_q`` as its weight.

    Returns:
        How many they were.
    """
    weights = [weight for _, weight in quantised_weights(model)]
    for weight in weights:
        become_whole(weight, weight.matrix())
    for owner, name in _marks(model):
        delattr(owner, name)
    return len(weights)


def become_whole(weight: QuantisedWeight, matrix: Tensor) -> None:
    """Turn a quantised layer into an ordinary one for good, an (out, in) `matrix` its weight."""
    layer: Any = weight.layer
    whole = weight.in_layout(matrix.to(weight.dtype))
    layer.__class__ = nn.Linear
    if weight.stored_transposed:
        layer.__class__, layer.nx, layer.nf = Conv1D, layer.in_features, layer.out_features
        del layer.in_features, layer.out_features
    layer._parameters["weight"] = nn.Parameter(whole, requires_grad=False)
    for name in layer.__dict__.keys() & _OF_QUANTISED_LAYERS:
        delattr(layer, name)  # one of them may hold the packed numbers


_OF_QUANTISED_LAYERS = {
    *("made_from", "source_cls", "state", "index"),
    *("compute_dtype", "compute_type_is_set", "quant_state", "quant_storage"),
    "support_avx512bf16_for_cpu",
}
"""Attributes that quantised layers have beyond those of `nn.Linear`."""


@contextmanager
def unmarked(model: nn.Module) -> Iterator[None]:
    """Let a model say nothing of being quantised, while whole weights are written in its name."""
    marks = [(owner, name, getattr(owner, name)) for owner, name in _marks(model)]
    for owner, name, _ in marks:
        delattr(owner, name)
    try:
        yield
    finally:
        for owner, name, value in marks:
            setattr(owner, name, value)


def _marks(model: nn.Module) -> list[tuple[Any, str]]:
    """Where a model says that it is quantised, whoever quantised it."""
    of_model = (*FLAGS.values(), "is_quantized", "hf_quantizer", "quantization_method")
    named: list[tuple[Any, str]] = [(model, name) for name in of_model]
    named.append((getattr(model, "config", None), "quantization_config"))
    return [(owner, name) for owner, name in named if owner is not None and name in vars(owner)]


def require_exact_layers(model: nn.Module) -> None:
    """Keep bitsandbytes' own 4-bit layers computing with their weights, and differentiable.

    In evaluation on some CPUs they repack their weight, which rounds its scales and leaves it without a
    gradient; from now on they do not.

    Raises:
        AdapterStateError: One is repacked already, or computes with other numbers than it holds.
    """
    library = _loaded_library()
    if library is None:
        return
    bnb, modules = cast(Any, library), cast(Any, model.named_modules())
    for path, layer in modules:
        if not isinstance(layer, bnb.nn.Linear4bit) or not layer.weight.bnb_quantized:
            continue
        state = layer.weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):
            raise AdapterStateError(
                f"bitsandbytes has repacked the weight of '{path}' in an evaluation on the CPU, and no gradient "
                "passes through it any more. Load the base anew and attach the adapter before the model is run, "
                "or load it by lorakit.models.loading.load_base(name, dtype='nf4'), which keeps it from that."
            )
        layer.support_avx512bf16_for_cpu = False
        own_product = type(layer).__module__.startswith("bitsandbytes.")
        if own_product and layer.in_features % state.blocksize:
            computed = bnb.functional.dequantize_4bit(layer.weight.data, state)
            if not computed.equal(expanded_4bit(layer.weight.data, state, state.dtype)):
                raise AdapterStateError(
                    f"'{path}' has {layer.in_features} inputs, which is no multiple of {state.blocksize}, and this "
                    "bitsandbytes computes it with the scales of other blocks. Load the whole weights by "
                    "lorakit.models.loading.load_base(name, dtype='nf4'), whose layers do not."
                )
