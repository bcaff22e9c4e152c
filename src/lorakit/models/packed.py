"""Layers that a library other than bitsandbytes has quantised.

lorakit computes with such layers and does not read their numbers. An adapter acts beside the layer's own product, so
it needs only the layer's output. What needs the numbers is an error: merging, DoRA, PiSSA, and training the weight.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import AdapterStateError, ConfigurationError
from lorakit.models.digests import Digests, digest
from lorakit.models.dtypes import FLOATS, dtype_name
from lorakit.models.layers import (
    call_forward,
    copy_of,
    device_of,
    is_linear,
    is_packed_linear,
    packs_numbers,
    weight_shape,
)
from lorakit.models.quantised import quantised_weight
from lorakit.models.tree import base_modules


@dataclass(frozen=True)
class PackedWeight:
    """A weight whose numbers lorakit does not read."""

    kind: str
    """How it is quantised (`packed_by`)."""
    shape: torch.Size
    """Shape of the unpacked weight of a linear layer; of another tensor, that of its storage."""
    tensors: list[Tensor]
    """The tensors that determine its numbers; empty if they cannot be read."""

    def numel(self) -> int:
        """Number of elements of this shape."""
        return self.shape.numel()

    def digests(self) -> Digests:
        """Return the digest of the packed numbers."""
        exact = hashlib.sha256(f"{tuple(self.shape)}\0".encode())
        for tensor in self.tensors:
            exact.update(digest(tensor, tensor.dtype))
        return Digests(exact.digest(), None)


def packed_weight(layer: nn.Module, kind: str) -> PackedWeight:
    """Return the weight of a linear layer that `packed_layers` yields, for a fingerprint.

    The digest of a layer may differ between two kernels, which pack the same numbers in another order.
    """
    stored: dict[str, Any] = {n: p for n, p in layer._parameters.items() if n != "bias"}
    hidden = layer._non_persistent_buffers_set
    stored |= {n: b for n, b in layer._buffers.items() if n not in hidden}
    stored |= getattr(layer, "meta", None) or {}  # HQQ keeps its scales there
    tensors = [stored[name] for name in sorted(stored) if isinstance(stored[name], Tensor)]
    return PackedWeight(kind, torch.Size(weight_shape(layer)), _plain(tensors))


def packed_tensor(tensor: Tensor, kind: str) -> PackedWeight:
    """Return a packed parameter of another layer, for a fingerprint."""
    return PackedWeight(kind, tensor.shape, _plain([tensor]))


def _plain(tensors: list[Tensor]) -> list[Tensor]:
    """Replace tensors of other classes by those inside them; return nothing if a class does not expose them."""
    plain = []
    for tensor in tensors:
        if not packs_numbers(tensor):
            plain.append(tensor)
        elif hasattr(tensor, "__tensor_flatten__"):
            names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
            inner = _plain([getattr(tensor, name) for name in names])
            if not inner:
                return []
            plain += inner
        else:
            return []
    return plain


def packed_by(layer: nn.Module, attribute: str = "weight") -> str | None:
    """Return how another library than bitsandbytes has quantised a parameter of a layer; None if none has.

    It is the name of the layer's class (GPTQ, AWQ, HQQ), of the tensor's (torchao, quanto), or of a dtype such as
    float8_e4m3fn.
    """
    tensor = layer._parameters.get(attribute)
    if is_packed_linear(layer) and (tensor is None or is_packed(tensor)):
        return type(layer).__name__
    if tensor is None or not is_packed(tensor) or quantised_weight(layer, tensor) is not None:
        return None
    return type(tensor).__name__ if packs_numbers(tensor) else dtype_name(tensor.dtype)


def is_packed(tensor: Tensor) -> bool:
    """Whether a tensor holds packed numbers: in a dtype without arithmetic, or in a class that unpacks on access."""
    has_arithmetic = tensor.dtype in FLOATS or tensor.dtype.is_complex
    return packs_numbers(tensor) or not has_arithmetic


def packed_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield path, layer and `packed_by` of every linear layer of the base that another library has quantised."""
    for path, layer in base_modules(model):
        if is_linear(layer) and (kind := packed_by(layer)) is not None:
            yield path, layer, kind


def require_own_parameters(model: nn.Module) -> None:
    """Reject layers whose parameters compressed-tensors manages: it writes a new parameter into the old one.

    So nothing could restore the base. Its first forward pass unpacks all weights in any case.

    Raises:
        AdapterStateError: With the path of such a layer, and the fix.
    """
    for path, layer in base_modules(model):
        if hasattr(layer, "ct_decompress_hook") or not isinstance(layer._parameters, dict):
            raise AdapterStateError(
                f"compressed-tensors manages the parameters of '{path or type(layer).__name__}', and copies new ones "
                "into the base's. Load the base unpacked, which needs no more memory than its first forward pass: "
                "from_pretrained(..., quantization_config=CompressedTensorsConfig(dequantize=True)), or "
                "lorakit.load_base(...)."
            )


def require_numbers(layer: nn.Module, attribute: str, reader: str) -> None:
    """Reject a layer whose numbers are not known, where `reader` depends on them.

    Raises:
        ConfigurationError: Another library than bitsandbytes has quantised the weight.
    """
    if (kind := packed_by(layer, attribute)) is not None:
        raise ConfigurationError(
            f"{reader} the weight of this {type(layer).__name__}, which is quantised ({kind}), and lorakit reads only "
            "the numbers of bitsandbytes. Load the base in bfloat16 or float32, or do without."
        )


def require_gradients(model: nn.Module, trained: Iterable[str]) -> None:
    """Check on one layer of each kind that gradients pass through it: some kernels are for inference only.

    Without an error the layers before would get none. Layers before the first trained one need none and are not tried.

    Args:
        model: The base.
        trained: The paths of the layers that are adapted or trained.

    Raises:
        AdapterStateError: With the path of a layer that stops gradients.
    """
    order = {path: number for number, (path, _) in enumerate(base_modules(model))}
    first = min((order.get(path, 0) for path in trained), default=len(order))
    dtype = getattr(model, "dtype", torch.float32)
    tried = set()
    for path, layer, kind in packed_layers(model):
        device = device_of(layer)
        if order[path] <= first or (type(layer), kind) in tried or device.type == "meta":
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
            passes = output.requires_grad and (
                torch.autograd.grad(output.sum(), x, allow_unused=True)[0] is not None
            )
    except Exception as error:
        return f"in training it raises {type(error).__name__} ({error})"
    return None if passes else "its output has no gradient"
