"""Tiny models whose linear layers are quantised in the ways of libraries other than bitsandbytes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import tiny_models
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

GROUP = 16
"""Inputs that share a scale."""


class GroupedInt4(nn.Module):
    """A class of its own with packed integers in buffers, as in GPTQ and AWQ: two numbers of 4 bits in each byte."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        groups = layer.weight.detach().unflatten(1, (-1, GROUP))
        scales = groups.abs().amax(-1, keepdim=True) / 7
        levels = (groups / scales).round().add(8).to(torch.uint8).flatten(1)
        self.register_buffer("qweight", levels[:, ::2] | levels[:, 1::2] << 4)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        levels = torch.stack([self.qweight & 15, self.qweight >> 4], -1).flatten(1)
        W = (levels.to(x.dtype) - 8).unflatten(1, (-1, GROUP)) * self.scales
        return F.linear(x, W.flatten(1), self.bias)


class OwnState(GroupedInt4):
    """Writes and reads its tensors in a way of its own, without its children, as in HQQ."""

    def state_dict(
        self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> Any:
        written = {} if destination is None else destination
        for name, tensor in self._buffers.items():
            if tensor is not None:
                written[prefix + name] = tensor
        return written

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.qweight = state_dict[f"{prefix}qweight"]


class InferenceOnly(GroupedInt4):
    """Its kernel records no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


class RefusesTraining(GroupedInt4):
    """Its kernel raises an error in training."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise NotImplementedError("this kernel is for inference")
        return super().forward(x)


class Float8Linear(nn.Linear):
    """An `nn.Linear` whose weight is in float8 with a scale beside it, as in the FP8 checkpoints of transformers."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        W = layer.weight.detach()
        scale = W.abs().max() / 448
        self.weight = nn.Parameter((W / scale).to(torch.float8_e4m3fn), requires_grad=False)
        self.weight_scale_inv = nn.Parameter(scale, requires_grad=False)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.weight_scale_inv, self.bias)


class Int8Tensor(Tensor):
    """A tensor of float32 to the outside, with its integers inside, as in torchao. It knows one product alone."""

    levels: Tensor
    scales: Tensor

    @staticmethod
    def __new__(cls, levels: Tensor, scales: Tensor) -> Int8Tensor:
        return Tensor._make_wrapper_subclass(cls, levels.shape, dtype=scales.dtype)

    def __init__(self, levels: Tensor, scales: Tensor) -> None:
        self.levels, self.scales = levels, scales

    def dequantize(self) -> Tensor:
        return self.levels * self.scales

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.dequantize(), *bias)
        return super().__torch_function__(function, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].levels, args[0].scales)
        raise NotImplementedError(f"{cls.__name__} does not implement {function}")


def with_int8_tensor(layer: nn.Linear) -> nn.Linear:
    """Return an `nn.Linear` with an `Int8Tensor` as its weight."""
    packed = copy.deepcopy(layer)
    scales = layer.weight.detach().abs().amax(1, keepdim=True) / 127
    levels = (layer.weight.detach() / scales).round().to(torch.int8)
    packed.weight = nn.Parameter(Int8Tensor(levels, scales), requires_grad=False)
    return packed


class InferenceOnlyWithoutError(GroupedInt4):
    """Its output has a gradient, but not with regard to its input: the scales are a parameter."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        scales = self.scales
        del self.scales
        self.scales = nn.Parameter(scales)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


class CopiesIn(MutableMapping[str, Any]):
    """Parameters of a layer that are written in place, as in compressed-tensors after its first forward pass."""

    def __init__(self, parameters: dict[str, Any]) -> None:
        self.own = parameters

    def __getitem__(self, name: str) -> Any:
        return self.own[name]

    def __setitem__(self, name: str, parameter: Any) -> None:
        if self.own.get(name) is None:
            self.own[name] = parameter
        else:
            self.own[name].data.copy_(parameter.data)

    def __delitem__(self, name: str) -> None:
        del self.own[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.own)

    def __len__(self) -> int:
        return len(self.own)


def with_managed_parameters(layer: nn.Linear) -> nn.Linear:
    """Return a copy of the layer whose `_parameters` copies new parameters into the old ones."""
    managed = copy.deepcopy(layer)
    managed.__dict__["_parameters"] = CopiesIn(managed._parameters)
    return managed


KINDS: dict[str, Callable[[Any], nn.Module]] = {
    "GroupedInt4": GroupedInt4,
    "OwnState": OwnState,
    "float8_e4m3fn": Float8Linear,
    "Int8Tensor": with_int8_tensor,
}
"""By the name that lorakit's messages give: a function that quantises a linear layer."""


def pack(model: nn.Module, quantise: Callable[[Any], nn.Module]) -> None:
    """Quantise the linear layers in the blocks of a model."""
    for path, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and any(part.isdecimal() for part in path.split(".")):
            model.set_submodule(path, quantise(layer).train(layer.training))


def packed_and_twin(kind: str, arch: str = "llama", **settings: Any) -> tuple[Any, Any]:
    """Return a quantised model, and one of ordinary layers with the same numbers."""
    model, twin = (tiny_models.build(arch, **settings) for _ in range(2))
    pack(model, KINDS[kind])
    with torch.no_grad():
        for path, layer in twin.named_modules():
            quantised = model.get_submodule(path)
            if quantised is not layer and type(layer) is nn.Linear and path in packed_paths(model):
                layer.weight.copy_(matrix(quantised))
    return model, twin


def packed_paths(model: PreTrainedModel) -> list[str]:
    """Return the paths of the layers that `pack` replaced."""
    return [
        path
        for path, layer in model.named_modules()
        if any(part.isdecimal() for part in path.split("."))
        and isinstance(layer, (nn.Linear, GroupedInt4))
    ]


def matrix(layer: Any) -> Tensor:
    """Return the numbers of a layer's weight: its product with the identity."""
    bias = 0 if layer.bias is None else layer.bias
    return (layer(torch.eye(layer.in_features)) - bias).T.detach()
