"""Layers that a library other than bitsandbytes has quantised.

lorakit computes with such layers and does not read their numbers. An adapter acts beside the layer's own product, so
it needs only the layer's output. What needs the numbers is an error: merging, DoRA, PiSSA, and training the weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from lorakit.errors import AdapterStateError, ConfigurationError
from lorakit.models.dtypes import FLOATS, dtype_name
from lorakit.models.layers import (
    call_forward,
    copy_of,
    device_of,
    is_linear,
    is_packed_linear,
    weight_shape,
)
from lorakit.models.quantised import quantised_weight
from lorakit.models.sharding import is_sharded
from lorakit.models.tree import base_modules


@dataclass(frozen=True)
class PackedWeight:
    """A weight whose numbers lorakit does not read."""

    kind: str
    """How it is quantised (`packed_by`)."""
    shape: torch.Size
    """Shape of the unpacked weight of a linear layer; of another tensor, that of its storage."""

    def numel(self) -> int:
        """Number of elements of this shape."""
        return self.shape.numel()


def packed_by(layer: nn.Module, attribute: str = "weight") -> str | None:
    """Return how another library than bitsandbytes has quantised a parameter of a layer; None if none has.

    It is the name of the layer's class (GPTQ, AWQ, HQQ), of the tensor's (torchao, quanto), of a dtype such as
    float8_e4m3fn, or of the mapping in which the library keeps the layer's parameters (compressed-tensors): such a
    mapping copies a new parameter into the old one, so nothing could restore the old numbers.
    """
    if not isinstance(layer._parameters, dict):
        return type(layer._parameters).__name__
    tensor = layer._parameters.get(attribute)
    if is_packed_linear(layer) and (tensor is None or is_packed(tensor)):
        return type(layer).__name__
    if tensor is None or not is_packed(tensor) or quantised_weight(layer, tensor) is not None:
        return None
    return dtype_name(tensor.dtype) if _has_plain_class(tensor) else type(tensor).__name__


def require_numbers(layer: nn.Module, attribute: str = "weight") -> None:
    """Reject a layer whose numbers are not known, where an adapter depends on them.

    Raises:
        ConfigurationError: With the options that do.
    """
    if (kind := packed_by(layer, attribute)) is not None:
        raise ConfigurationError(
            f"dora and init='pissa' read the weight of this {type(layer).__name__}, which is quantised ({kind}), and "
            "lorakit reads only the numbers of bitsandbytes. Use LoRA without them, or load the base in bfloat16 or "
            "float32."
        )


def is_packed(tensor: Tensor) -> bool:
    """Whether a tensor holds packed numbers: in a dtype without arithmetic, or in a class that unpacks on access."""
    if isinstance(tensor, FakeTensor) or is_sharded(tensor):
        return False
    has_arithmetic = tensor.dtype in FLOATS or tensor.dtype.is_complex
    return not (has_arithmetic and _has_plain_class(tensor))


def _has_plain_class(tensor: Tensor) -> bool:
    return type(tensor) is Tensor or issubclass(type(tensor), nn.Parameter)


def packed_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield path, layer and `packed_by` of every linear layer of the base that another library has quantised."""
    for path, layer in base_modules(model):
        if is_linear(layer) and (kind := packed_by(layer)) is not None:
            yield path, layer, kind


def require_gradients(model: nn.Module) -> None:
    """Check on one layer of each kind that gradients pass through it: some kernels are for inference only.

    Without an error the layers below would get none.

    Raises:
        AdapterStateError: With the path of a layer that stops them.
    """
    dtype = getattr(model, "dtype", torch.float32)
    tried = set()
    for path, layer, kind in packed_layers(model):
        device = device_of(layer)
        if (type(layer), kind) in tried or device.type == "meta":
            continue
        tried.add((type(layer), kind))
        x = torch.zeros(1, weight_shape(layer)[1], dtype=dtype, device=device, requires_grad=True)
        if reason := _why_no_gradient(layer, x):
            raise AdapterStateError(
                f"No gradient passes through '{path}' ({kind}): {reason}. Load the base with a kernel for training, "
                'for example with "backend": "auto_trainable" in the quantization_config of its config.json (GPTQ).'
            )


def _why_no_gradient(layer: nn.Module, x: Tensor) -> str | None:
    """Return why no gradient reaches `x`, or None if one does or the layer does not take `x` in evaluation either."""
    try:
        with torch.no_grad():
            call_forward(copy_of(layer), x)
    except Exception:
        return None
    try:
        with torch.enable_grad():
            output = call_forward(copy_of(layer).train(), x)
    except Exception as error:
        return f"in training it raises {type(error).__name__} ({error})"
    return None if output.requires_grad else "its output has no gradient"
