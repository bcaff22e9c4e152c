"""What a method adds to a model: modules that sit on layers, and base tensors that are trained."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


class AdapterModule(nn.Module):
    """The tensors of one adapter on one layer of the base model, and what they do there.

    A layer is any module of the base: a projection, a norm, a dropout, a whole block.

    A plain `AdapterModule` does nothing but hold trained copies of its layer's own parameters
    (`trained`: a bias, a whole classification head). Subclasses add an effect on the output.
    """

    scales: bool = True
    """Whether the effect is linear in a weight, so that adapters can be mixed by weight."""
    merges: bool = True
    """Whether the effect is a change of the layer's weights, which a merge can make."""
    by_token: bool = False
    """Whether the effect on a token's output depends on nothing of other tokens, so that some tokens of a batch can
    be computed without the others. A subclass that overrides `adapt` answers for itself."""
    shadows: tuple[str, ...] = ()
    """Names of layer weights replaced for the length of a call, where the output cannot be added to."""

    def __init__(self) -> None:
        super().__init__()
        self.trained = nn.ParameterDict()

    def adapt(self, layer: nn.Module, x: Any, output: Any, weight: float) -> Any:
        """Return `output` with the adapter's effect, scaled by `weight`; the plain module has none.

        Of a layer that returns a tuple `output` is the first entry: a block's hidden states.
        """
        return output

    def delta_weights(self, layer: nn.Module) -> dict[str, Tensor]:
        """What a merge adds to the layer's weights, by attribute, in float32 (or wider)."""
        return {}

    def changed_weights(self, layer: nn.Module) -> list[str]:
        """The attributes of the layer's weights that a merge changes: known without computing them, where it can be."""
        return list(self.merged_weights(layer) or self.delta_weights(layer))

    def merged_weights(self, layer: nn.Module) -> dict[str, Tensor] | None:
        """Whole merged weights where they are no sum of W and a delta (DoRA), else None."""
        return None


@runtime_checkable
class Method(Protocol):
    """A way to adapt a model, as a frozen dataclass of its settings."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def modules(self, model: nn.Module, dtype: torch.dtype = ...) -> dict[str, AdapterModule]:
        """The modules to add, by path of the layer they sit on; works on a meta-device model too.

        Raises:
            TargetError: A target names no layer or one that cannot be adapted.
            ConfigurationError: A setting does not fit a layer (rank above its width).
        """
        ...

    def trained_parameters(self, model: nn.Module) -> list[str]:
        """Names of base parameters that are trained in full, each through a copy of its own."""
        ...


def describe(method: Method) -> str:
    """Return a method as text, with the settings that differ from its defaults."""
    fields = getattr(type(method), "__dataclass_fields__", {})
    changed = []
    for name, field in fields.items():
        value = getattr(method, name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        if value != default:
            changed.append(f"{name}={_described(value)}")
    return f"{type(method).__name__}({', '.join(changed)})"


def _described(value: Any) -> str:
    if isinstance(value, tuple) and value and all(isinstance(item, Method) for item in value):
        return f"({', '.join(map(describe, value))})"
    return repr(value)


def merge_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype in which weights are combined before one rounding: float32, or float64 if any is."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
